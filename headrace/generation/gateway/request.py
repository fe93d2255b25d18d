"""A request for a reply, as OpenAI's clients send it: what it asks for, and what it may not decide.

The ticket decides how is sampled. Parameters that would change it are ignored; those that would constrain what is
sampled are refused, because the engine's log-probabilities would then be those of another distribution.
"""

from collections import Counter
from typing import Any, Literal, NamedTuple

import msgspec

from headrace.common.wire import one_line
from headrace.common.wire.json_checks import json_problem, tools_problem
from headrace.common.wire.structs import MAX_STOP_CHARS, MAX_STOPS, MAX_TOKEN
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.errors import BadRequest
from headrace.generation.gateway.messages import to_message

MAX_MESSAGES = 4096
READ = {"messages", "tools", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "model"}
IGNORED = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "parallel_tool_calls",
    "reasoning_effort",
    "chat_template_kwargs",
}
"""Known parameters without effect; of others only the number is counted."""
CONSTRAINING = (
    "regex",
    "ebnf",
    "json_schema",
    "structural_tag",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "custom_logit_processor",
    "bad_words",
    "allowed_token_ids",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "continue_final_message",
)
"""Besides those that are constraining only by their value (`_constraints`)."""
NOT_SUPPORTED = {"functions": "tools", "function_call": "tools", "audio": "text", "prompt": "messages"}
"""With what is expected instead."""


class ChatRequest(NamedTuple):
    conversation: Conversation
    max_tokens: int | None
    stop: list[str]
    is_streamed: bool
    includes_usage: bool
    """Of a streamed reply."""
    parses_calls: bool


def read_request(content: bytes, constrained: Literal["refuse", "ignore"], ignored: Counter[str]) -> ChatRequest:
    """Raises `BadRequest` with the reason; adds the names of parameters without effect to `ignored`."""
    body = _decoded(content)
    constraints = _constraints(body)
    if constraints and constrained == "refuse":
        raise BadRequest(
            f"{constraints[0]} would constrain what is sampled, and its log-probabilities with it; expected a request "
            "without it, or environment.constrained: ignore"
        )
    for name, instead in NOT_SUPPORTED.items():
        if body.get(name) is not None:
            raise BadRequest(f"{name} is not supported, expected {instead}")
    given = {name for name, value in body.items() if value is not None}
    ignored.update(constraints)
    ignored.update(name if name in IGNORED else "other" for name in given - READ - set(CONSTRAINTS_BY_VALUE))
    stream_options = body.get("stream_options")
    return ChatRequest(
        Conversation(_messages(body.get("messages")), _tools(body.get("tools"))),
        _max_tokens(body),
        _stop(body.get("stop")),
        body.get("stream") is True,
        isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        body.get("tool_choice") != "none",
    )


CONSTRAINTS_BY_VALUE = ("n", "logit_bias", "response_format", "tool_choice", "modalities")


def _decoded(content: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a {type(body).__name__}, expected an object")
    if problem := json_problem("a body", body):
        raise BadRequest(f"the request {problem}")
    return body


def _constraints(body: dict[str, Any]) -> list[str]:
    """The names of parameters by which the request constrains what is sampled."""
    found = [name for name in CONSTRAINING if body.get(name) not in (None, False)]
    response_format, tools = body.get("response_format"), body.get("tools")
    is_constraining = {
        "n": body.get("n") not in (None, 1),
        "logit_bias": body.get("logit_bias") not in (None, {}),
        "response_format": response_format not in (None, {"type": "text"}),
        "tool_choice": body.get("tool_choice") not in (None, "auto", "none"),
        "modalities": body.get("modalities") not in (None, ["text"]),
        "strict": isinstance(tools, list) and any(map(_is_strict, tools)),
    }
    return [*found, *(name for name, applies in is_constraining.items() if applies)]


def _is_strict(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and function.get("strict") is True


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_MESSAGES:
        raise BadRequest(f"messages: expected a list of 1 to {MAX_MESSAGES} messages")
    return [to_message(message, place) for place, message in enumerate(given)]


def _tools(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRequest("tools: expected a list of objects")
    if problem := tools_problem(given):
        raise BadRequest(f"the request {problem}")
    return given


def _max_tokens(body: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= MAX_TOKEN:
            raise BadRequest(f"{name} is {one_line(repr(value))}, expected 1 to {MAX_TOKEN}")
        return value
    return None


def _stop(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if texts is None:
        return []
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(map(_is_stop, texts)):
        raise BadRequest(f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return texts


def _is_stop(text: Any) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARS
