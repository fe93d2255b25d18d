"""What a request continues: its messages and its tools."""

from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.common.wire import Message
from headrace.generation.gateway.messages import MessageForm, form_of


class Conversation:
    """Messages by `to_message`, and tools as in OpenAI's API."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        self.messages = _with_tool_names(messages)
        self.tools = list(tools)
        self.forms = [form_of(message) for message in messages]
        self.tools_key = msgspec.json.encode(self.tools, order="deterministic")

    def equals(self, other: "Conversation") -> bool:
        return self.tools_key == other.tools_key and self.forms == other.forms

    def begins_like(self, other: "Conversation") -> bool:
        """Whether both have the same messages up to the first that is not the system's."""
        return self._opening() == other._opening()

    def _opening(self) -> list[MessageForm]:
        first = next((place for place, form in enumerate(self.forms) if form.role != "system"), len(self.forms))
        return self.forms[: first + 1]


def _with_tool_names(messages: Sequence[Message]) -> list[Message]:
    """Tool messages with the name of the tool that was called, which some templates need and few clients send."""
    called = {call["id"]: call["function"]["name"] for one in messages for call in one.get("tool_calls") or ()}
    return [
        {"name": called[message["tool_call_id"]], **message} if message.get("tool_call_id") in called else message
        for message in messages
    ]
