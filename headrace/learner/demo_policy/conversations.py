"""Demonstrations: conversations in which the policy is trained to write the assistant's messages."""

from dataclasses import dataclass, field
from typing import Any

from headrace.common.tasks import Prompt
from headrace.common.wire import Message


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas, as OpenAI's `tools`."""


def answered(prompt: Prompt, answer: str) -> Conversation:
    """A conversation that ends with this answer to the prompt."""
    return Conversation([*prompt.messages, {"role": "assistant", "content": answer}], prompt.tools)
