"""A reply of the model, as an environment sees it."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from headrace.common.environments.tool_calls import ToolCall, answer_calls, parse_call
from headrace.common.wire import Message

Limit = Literal["max_turns", "max_tokens", "max_segments", "context"]


class ReplyContent(msgspec.Struct, frozen=True):
    """What `Reply` and `BlockingReply` have in common."""

    text: str = ""
    reasoning: str = ""
    """Where the model's reasoning is told apart from its answer."""
    tool_calls: list[ToolCall] = []
    finish_reason: Literal["stop", "tool_calls", "length"] | Limit = "stop"
    """`length`: cut off at `sampling.max_new_tokens` or `max_tokens`. A limit of the episode: nothing was sampled, and
    nothing more will be where the limit is `max_turns` or `max_tokens`."""


class Reply(ReplyContent, frozen=True):
    async def run(self, *functions: Callable[..., Any]) -> list[Message]:
        """Calls the functions that the model named, one call after the other; returns a tool message for each call.

        A plain function runs on the worker's event loop, where other episodes wait for it meanwhile. An unknown name,
        arguments that do not fit, an exception, and a result above 64 KiB become the message's text. The first 64 calls
        are answered, and the last message says how many were not.
        """
        return await answer_calls(self.tool_calls, functions)


class BlockingReply(ReplyContent, frozen=True):
    def run(self, *functions: Callable[..., Any]) -> list[Message]:
        """As `Reply.run`, in the thread that calls it."""
        return asyncio.run(answer_calls(self.tool_calls, functions))


def parse_reply(choice: dict[str, Any]) -> ReplyContent:
    """Of a choice of an OpenAI reply."""
    message = choice["message"]
    calls = [parse_call(call) for call in message.get("tool_calls") or []]
    return ReplyContent(
        message.get("content") or "", message.get("reasoning_content") or "", calls, choice["finish_reason"]
    )
