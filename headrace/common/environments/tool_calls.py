"""Answers the tool calls of a reply: what goes wrong with a call becomes the text of its tool message.

The model then reads that text, so nothing that it writes is an error of the environment.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headrace.common.environments.schema import name_of
from headrace.common.wire import Message

MAX_CALLS = 64
"""Calls of one reply that are answered."""
MAX_RESULT_BYTES = 64 << 10
MAX_ERROR_CHARS = 1000

Function = Callable[..., Any]


class ToolCall(msgspec.Struct, frozen=True):
    """A function that the model called in its reply."""

    name: str
    arguments: dict[str, Any]
    id: str
    problem: str = ""
    """Why its arguments cannot be read; `arguments` is then empty."""


def parse_call(call: dict[str, Any]) -> ToolCall:
    """A call of an OpenAI reply."""
    function, call_id = call["function"], str(call.get("id") or "")
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        return ToolCall(function["name"], {}, call_id, f"its arguments are no JSON: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(function["name"], {}, call_id, f"its arguments are {arguments!r:.80}, expected an object")
    return ToolCall(function["name"], arguments, call_id)


async def answer_calls(calls: Sequence[ToolCall], functions: Sequence[Function]) -> list[Message]:
    """One tool message for each of the first `MAX_CALLS` calls, which run one after the other."""
    by_name = {name_of(function): function for function in functions}
    if len(by_name) < len(functions):
        raise ValueError(
            f"two functions have one name; expected different names, got {sorted(map(name_of, functions))}"
        )
    checked = {name: _checking(function) for name, function in by_name.items()}
    texts = [await _answer(call, checked) for call in calls[:MAX_CALLS]]
    if len(calls) > MAX_CALLS:
        texts[-1] += f"\nerror: {len(calls) - MAX_CALLS} more calls were not answered; expected at most {MAX_CALLS}"
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}
        for call, text in zip(calls, texts, strict=False)
    ]


def _checking(function: Function) -> Function:
    """The function, which raises if its arguments do not fit its signature."""
    from pydantic import ConfigDict, validate_call

    return validate_call(config=ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True))(function)


async def _answer(call: ToolCall, functions: dict[str, Function]) -> str:
    if call.problem:
        return f"error: {call.name}: {call.problem}"
    function = functions.get(call.name)
    if function is None:
        return f"error: there is no function {call.name!r}; expected one of {sorted(functions)}"
    try:
        result = function(**call.arguments)
        text = _text_of(await result if inspect.isawaitable(result) else result)
    except Exception as error:  # noqa: BLE001 - a tool may raise anything, and the model reads it
        return f"error: {call.name}: {_describe(error)}"
    size = len(text.encode())
    if size > MAX_RESULT_BYTES:
        return f"error: {call.name}: its result has {size:,} bytes, expected at most {MAX_RESULT_BYTES:,}"
    return text


def _text_of(result: Any) -> str:
    """A text as it is, anything else as JSON; half characters are escaped."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace").decode()


def _describe(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems)
    else:
        text = f"{type(error).__name__}: {error}"
    return text[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode()
