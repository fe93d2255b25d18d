"""The conversation of one episode with the model, for an asynchronous `rollout` and for a plain one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from headrace.common.environments.reply import BlockingReply, Limit, Reply, ReplyContent, parse_reply
from headrace.common.wire import Message

Send = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | Limit]]
"""Sends the body of a request for a reply; returns the choice that was sampled, or the limit at which none was."""
Kind = TypeVar("Kind", Reply, BlockingReply)


class ChatError(RuntimeError):
    """The model's endpoint refused the request; the text says why."""


class _Conversation:
    """What `Chat` and `BlockingChat` have in common."""

    def __init__(
        self,
        send: Send,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        base_url: str,
        api_key: str,
        model: str,
        seed: int = 0,
        attempt: int = 0,
    ) -> None:
        self.messages: list[Message] = list(messages)
        """The conversation so far. It begins with the ticket's messages; a rollout may change it."""
        self.seed = seed
        """Of this episode: the same whenever it is done again."""
        self.attempt = attempt
        """How often the episode was begun before."""
        self.base_url = base_url
        """Of the model's OpenAI-compatible endpoint, for agents with a client of their own."""
        self.api_key = api_key
        self.model = model
        self._tools = list(tools)
        self._send = send

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which OpenAI's clients find the endpoint, for a child process."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key, "OPENAI_MODEL": self.model}

    async def _sample(
        self, messages: Sequence[Message | str], tools: Sequence[dict[str, Any]] | None, max_tokens: int | None
    ) -> ReplyContent:
        self.messages += [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
        body: dict[str, Any] = {"model": self.model, "messages": self.messages}
        if offered := self._tools if tools is None else list(tools):
            body["tools"] = offered
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        choice = await self._send(body)
        if isinstance(choice, str):
            return ReplyContent(finish_reason=choice)
        self.messages.append(choice["message"])
        return parse_reply(choice)


class Chat(_Conversation):
    """For an `async def rollout`."""

    async def reply(
        self, *messages: Message | str, tools: Sequence[dict[str, Any]] | None = None, max_tokens: int | None = None
    ) -> Reply:
        """Adds `messages` to the conversation and samples the model's reply, which is added too.

        A text is a user message. `tools` (default: the prompt's) are JSON schemas, as `schema` makes them; `max_tokens`
        bounds this reply below `sampling.max_new_tokens`. At a limit of the episode the reply is empty, its
        `finish_reason` is the limit, and only `messages` are added. Raises `ChatError` if the request is refused.
        """
        return _copy(await self._sample(messages, tools, max_tokens), Reply)


class BlockingChat(_Conversation):
    """For a plain `def rollout`, which runs in a thread; the requests are sent by the event loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._loop = loop

    def reply(
        self, *messages: Message | str, tools: Sequence[dict[str, Any]] | None = None, max_tokens: int | None = None
    ) -> BlockingReply:
        """As `Chat.reply`; blocks the thread."""
        sampling = asyncio.run_coroutine_threadsafe(self._sample(messages, tools, max_tokens), self._loop)
        return _copy(sampling.result(), BlockingReply)


def _copy(content: ReplyContent, kind: type[Kind]) -> Kind:
    return kind(content.text, content.reasoning, content.tool_calls, content.finish_reason)
