"""What differs between the demo's policies: their task, and what they are shown in supervised training, how long."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from headrace.learner.demo_policy.conversations import Conversation

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Of a policy without tools."""
SINGLE_DIGITS = r"\d| ?[A-Za-z]+|[^\dA-Za-z]+"
"""Token boundaries: a digit, a word with its leading space, or a run of other characters."""
WHOLE_NUMBERS = r"\d+| ?[A-Za-z]+|[^\dA-Za-z]+"


@dataclass(frozen=True)
class Recipe:
    task: str
    """The built-in task on whose held-out prompts the policy is measured."""
    conversations: Callable[[int], Iterator[Conversation]]
    """The demonstrations, from a seed; at least `num_steps * batch_size`."""
    texts: Callable[[], Iterator[str]]
    """What the tokenizer is trained on."""
    token_boundaries: str
    """Regular expression; a token stays within one match."""
    chat_template: str
    num_steps: int
    batch_size: int
    learning_rate: float
    """Of the first step; it falls linearly to zero at the last."""
    settings: dict[str, Any]
    """How the demonstrations are composed, for the record in `made.json`."""
    added_tokens: tuple[str, ...] = ()
    """Texts that are one token each, and that decoding keeps."""
