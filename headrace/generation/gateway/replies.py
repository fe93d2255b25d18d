"""A reply as OpenAI's clients read it, whole or as a stream of events."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from headrace.common.wire import Message
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.engine.reply_parsing import ParsedCall, ParsedReply
from headrace.generation.gateway.segments import LimitName

KEEP_ALIVE = b": the reply is being sampled\n\n"
"""A comment, which clients pass over."""
END = b"data: [DONE]\n\n"


class ChatReply(NamedTuple):
    id: str
    created: int
    """Unix time in seconds."""
    model: str
    message: Message
    """As OpenAI's: arguments of tool calls are texts."""
    finish_reason: Literal["stop", "length", "tool_calls"]
    usage: dict[str, Any]
    limit: LimitName | None = None
    """The limit of the episode at which nothing was sampled."""

    def body(self) -> bytes:
        choice = {"index": 0, "message": self.message, "logprobs": None, **self._end()}
        return msgspec.json.encode(self._head("chat.completion") | {"choices": [choice], "usage": self.usage})

    def events(self, includes_usage: bool) -> Iterator[bytes]:
        """Server-sent events: the message, its end, the usage if asked for."""
        head = self._head("chat.completion.chunk")
        calls = [call | {"index": place} for place, call in enumerate(self.message.get("tool_calls") or ())]
        delta = self.message | ({"tool_calls": calls} if calls else {})
        for choice in ({"delta": delta, "finish_reason": None}, {"delta": {}, **self._end()}):
            yield event(head | {"choices": [{"index": 0, "logprobs": None, **choice}]})
        if includes_usage:
            yield event(head | {"choices": [], "usage": self.usage})
        yield END

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _end(self) -> dict[str, Any]:
        return {"finish_reason": self.finish_reason} | ({"limit": self.limit} if self.limit else {})


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def limit_reply(model: str, limit: LimitName) -> ChatReply:
    """Nothing was sampled."""
    return _reply(model, {"role": "assistant", "content": ""}, "length", _usage(0, 0, 0), limit)


def sampled_reply(model: str, num_prompt_tokens: int, sampled: SampledTurn, message: Message) -> ChatReply:
    completion = sampled.completion
    finish_reason = "tool_calls" if message.get("tool_calls") else completion.finish_reason
    usage = _usage(num_prompt_tokens, len(completion.tokens), sampled.cached_tokens)
    return _reply(model, message, finish_reason, usage)


def to_openai_message(parsed: ParsedReply, num_calls_before: int) -> Message:
    """The message of a reply; the ids of its calls, nine letters and digits, are new in the episode."""
    message: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        message["tool_calls"] = [
            _call(call, f"call{place:05d}") for place, call in enumerate(parsed.tool_calls, num_calls_before)
        ]
    return message


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts, as a client expects it; their tokens stay recorded."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def _call(call: ParsedCall, id_: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}


def _reply(model: str, message: Message, finish_reason: Any, usage: Any, limit: LimitName | None = None) -> ChatReply:
    return ChatReply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, message, finish_reason, usage, limit)


def _usage(num_prompt_tokens: int, num_sampled: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_sampled,
        "total_tokens": num_prompt_tokens + num_sampled,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
