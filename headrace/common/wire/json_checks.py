"""Conditions on values without a fixed type: a reference, chat messages, tools. Pure."""

import math
from collections.abc import Sequence
from typing import Any

MAX_DEPTH = 32
MAX_VALUES = 1_000_000


def json_problem(name: str, root: dict[str, Any] | Sequence[Any]) -> str:
    """Only JSON values, within bounds on depth and number; walks level by level, without recursion.

    Returns the problem with `name`, for "the ticket ...", or an empty text.
    """
    level: list[Any] = [root]
    num_values = 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                if any(type(key) is not str for key in value):
                    return f"has {name} with keys that are not text"
                inner += value.values()
            elif kind is list:
                inner += value
            elif kind is float:
                if not math.isfinite(value):
                    return f"has {name} with a number that is not finite"
            elif kind not in (str, int, bool, type(None)):
                return f"has {name} with a {kind.__name__}, which JSON does not have"
        num_values += len(inner)
        if num_values > MAX_VALUES:
            return f"has {name} of more than {MAX_VALUES} values"
        if not inner:
            return ""
        level = inner
    return f"has {name} that is nested more than {MAX_DEPTH} deep"


def messages_problem(messages: Sequence[dict[str, Any]]) -> str:
    """Each message has text as its role and content; a reply may have no content, as one that only calls tools."""
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key, "")
            is_call = key == "content" and value is None and message.get("role") == "assistant"
            if not (isinstance(value, str) or is_call):
                return f"has message {index} whose {key} is a {type(value).__name__}, expected text"
    return json_problem("a message", messages)


def tools_problem(tools: Sequence[dict[str, Any]]) -> str:
    """Each tool names a function."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"has tool {index} without the name of a function, as OpenAI's `tools` have"
    return json_problem("a tool", tools)
