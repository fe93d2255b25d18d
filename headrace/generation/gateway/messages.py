"""Messages of a request: as a chat template takes them, and in the one form in which they are compared.

Clients send earlier replies back in forms of their own: with white space trimmed, with arguments of tool calls written
anew, most without the reasoning. Such a message is still the reply that was sampled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from headrace.common.wire import Message
from headrace.common.wire.json_checks import json_problem
from headrace.generation.gateway.errors import BadRequest

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""By the names that clients use; OpenAI calls the system's messages `developer` for some models."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Templates and clients have no common name for the field that holds the reasoning."""


class MessageForm(NamedTuple):
    """What counts when two messages are compared."""

    role: str
    text: str
    calls: tuple[tuple[str, str, str], ...]
    """Name, arguments and id of each tool call."""
    call_id: str
    name: str
    reasoning: str
    """Empty if the message has none."""

    def is_sent_as(self, given: "MessageForm") -> bool:
        """Whether `given`, a message of a request, is this one; it may lack the reasoning."""
        return self[:-1] == given[:-1] and given.reasoning in ("", self.reasoning)


def is_prefix(recorded: Sequence[MessageForm], given: Sequence[MessageForm]) -> bool:
    """Whether a request begins with the recorded messages."""
    return len(recorded) <= len(given) and all(map(MessageForm.is_sent_as, recorded, given))


def form_of(message: Message) -> MessageForm:
    """The form of a message by `to_message`, or of a ticket's."""
    functions = [(call["function"], call["id"]) for call in message.get("tool_calls") or ()]
    return MessageForm(
        role=message["role"],
        text=(message.get("content") or "").strip(),
        calls=tuple((function["name"], _canonical(function["arguments"]), id_) for function, id_ in functions),
        call_id=message.get("tool_call_id") or "",
        name=(message.get("name") or "") if message["role"] in ("system", "user") else "",
        reasoning=next((message[field].strip() for field in REASONING_FIELDS if message.get(field)), ""),
    )


def to_message(given: Any, place: int) -> Message:
    """A message of a request as chat templates take it: text as its content, arguments of tool calls as objects.

    Raises `BadRequest` with its place if it is not understood.
    """
    if not isinstance(given, dict):
        raise BadRequest(f"messages[{place}] is a {type(given).__name__}, expected an object")
    role = ROLES.get(given["role"]) if isinstance(given.get("role"), str) else None
    if role is None:
        raise BadRequest(f"messages[{place}].role is {given.get('role')!r}, expected one of {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(given.get("content"), place)}
    for field in ("name", "tool_call_id", *REASONING_FIELDS):
        value = given.get(field)
        if not isinstance(value, str | None):
            raise BadRequest(f"messages[{place}].{field} is a {type(value).__name__}, expected text")
        if value:
            message[field] = value
    calls = given.get("tool_calls")
    if not isinstance(calls, list | None) or (calls and role != "assistant"):
        raise BadRequest(f"messages[{place}].tool_calls: expected a list, in a message of the assistant")
    if given.get("function_call") is not None:
        raise BadRequest(f"messages[{place}].function_call is not supported, expected tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call, place) for call in calls]
    return message


def _content(given: Any, place: int) -> str:
    """The text; of several parts, each on lines of its own."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise BadRequest(f"messages[{place}].content is a {type(given).__name__}, expected text or a list of parts")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise BadRequest(f"messages[{place}].content has a part of type {kind!r}, expected only text")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(given: Any, place: int) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    id_ = given.get("id", "") if isinstance(given, dict) else None
    if not (isinstance(name, str) and isinstance(arguments, str | dict | None) and isinstance(id_, str | None)):
        raise BadRequest(
            f"messages[{place}].tool_calls has a call that is not understood, expected an id and a function with its "
            "name and its arguments as text"
        )
    return {"id": id_ or "", "type": "function", "function": {"name": name, "arguments": parsed_arguments(arguments)}}


def parsed_arguments(given: str | dict[str, Any] | None) -> Any:
    """The arguments of a tool call as an object; as the text that the model wrote if it is none."""
    if isinstance(given, dict):
        return given
    try:
        found = msgspec.json.decode(given or "{}")
    except (msgspec.MsgspecError, RecursionError):
        return given
    return found if isinstance(found, dict) and not json_problem("arguments", found) else given


def _canonical(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments.strip()
    return msgspec.json.encode(_with_whole_numbers(arguments), order="deterministic").decode()


def _with_whole_numbers(value: Any) -> Any:
    """With 1 in place of 1.0, as JavaScript writes it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_whole_numbers(inner) for key, inner in value.items()}
    return [_with_whole_numbers(inner) for inner in value] if isinstance(value, list) else value
