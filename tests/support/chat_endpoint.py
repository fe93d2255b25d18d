"""An OpenAI-compatible endpoint that answers by a function, as the gateway would, for tests of what talks with it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from headrace.common.environments import BlockingChat, Chat
from headrace.common.environments.client import ChatClient

Answer = tuple[int, dict[str, Any]]
Answering = Callable[[dict[str, Any]], Answer | Awaitable[Answer]]


@dataclass
class Request:
    body: dict[str, Any]
    headers: dict[str, str]


def says(text: str, *calls: tuple[str, str], finish_reason: str | None = None, **message: Any) -> Answer:
    """The answer of a model that says `text` and calls functions by name and JSON arguments."""
    made = [
        {"id": f"call-{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    whole = {"role": "assistant", "content": text} | ({"tool_calls": made} if made else {}) | message
    reason = finish_reason or ("tool_calls" if made else "stop")
    return 200, {"choices": [{"index": 0, "message": whole, "finish_reason": reason}]}


def at_limit(limit: str) -> Answer:
    message = {"role": "assistant", "content": ""}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "length", "limit": limit}]}


def refuses(status: int, message: str, code: str = "") -> Answer:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": code}}


@dataclass
class ChatEndpoint:
    """Serves while it is entered. `answer` gives the status and the body for a request's body."""

    answer: Answering
    requests: list[Request] = field(default_factory=list)
    base_url: str = ""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(Request(body, dict(request.headers)))
        answer = self.answer(body)
        status, content = answer if isinstance(answer, tuple) else await answer
        return web.json_response(content, status=status)

    def chat(self, client: ChatClient, *messages: dict[str, Any], **settings: Any) -> Chat:
        return Chat(self._send(client), list(messages), **self._settings(settings))

    def blocking_chat(self, client: ChatClient, *messages: dict[str, Any], **settings: Any) -> BlockingChat:
        loop = asyncio.get_running_loop()
        return BlockingChat(loop, self._send(client), list(messages), **self._settings(settings))

    def _send(self, client: ChatClient) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        return lambda body: client.sample(self.base_url, "secret", body)

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.base_url, "api_key": "secret", "model": "policy", **settings}
