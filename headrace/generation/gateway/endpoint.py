"""The HTTP endpoint, as OpenAI's: `/v1/chat/completions` and `/v1/models`, for whoever has an open episode's secret."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.common.http.limits import CLOSING
from headrace.common.http.service import new_app
from headrace.generation.gateway.answering import AnsweredEpisode
from headrace.generation.gateway.errors import GatewayError
from headrace.generation.gateway.exchanges import Exchange
from headrace.generation.gateway.replies import KEEP_ALIVE, event
from headrace.generation.gateway.request import ChatRequest

MAX_REQUEST_BYTES = 16 << 20
KEEP_ALIVE_S = 5.0
"""Between two comments of a stream whose reply is being sampled; before the first, an error still has its status."""
EVENTS = "text/event-stream"
Authenticate = Callable[[str], AnsweredEpisode]
"""Returns the episode that the value of an `Authorization` header opens; raises `GatewayError`."""


def make_app(authenticate: Authenticate, answers: Counter[int]) -> FastAPI:
    """Counts the `answers` by status."""
    routes = [
        Route("/v1/chat/completions", _complete, methods=["POST"]),
        Route("/v1/models", _models, methods=["GET"]),
    ]
    app = new_app("Headrace gateway", MAX_REQUEST_BYTES, routes=routes, openapi_url=None)
    app.add_middleware(_EpisodeAccess, authenticate=authenticate, answers=answers)
    app.add_exception_handler(GatewayError, _refused)
    return app


class _EpisodeAccess:
    """ASGI middleware: finds the episode of a request before its body is read, and counts the answers."""

    def __init__(self, app: ASGIApp, authenticate: Authenticate, answers: Counter[int]) -> None:
        self.app = app
        self.authenticate = authenticate
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[message["status"]] += 1
            await send(message)

        try:
            scope["episode"] = self.authenticate(Request(scope).headers.get("authorization", ""))
        except GatewayError as error:
            await _json(error.body(), error.status, CLOSING)(scope, receive, count)
            return
        await self.app(scope, receive, count)


async def _complete(http: Request) -> Response:
    request, exchange = await http.scope["episode"].exchange(await http.body(), http.headers)
    if request.is_streamed and not await _is_done(exchange, KEEP_ALIVE_S):
        return StreamingResponse(_events(request, exchange), media_type=EVENTS)
    await _is_done(exchange)
    reply = exchange.result()
    exchange.is_delivered = not await http.is_disconnected()
    if request.is_streamed:
        return Response(b"".join(reply.events(request.includes_usage)), media_type=EVENTS)
    return Response(reply.body(), media_type="application/json")


async def _models(http: Request) -> Response:
    model = {"id": http.scope["episode"].model, "object": "model", "created": 0, "owned_by": "headrace"}
    return _json({"object": "list", "data": [model]})


async def _events(request: ChatRequest, exchange: Exchange) -> AsyncIterator[bytes]:
    """Comments until the reply is there; an error is an event, as the status has been sent."""
    yield KEEP_ALIVE
    while not await _is_done(exchange, KEEP_ALIVE_S):
        yield KEEP_ALIVE
    try:
        reply = exchange.result()
    except GatewayError as error:
        yield event(error.body())
        return
    for part in reply.events(request.includes_usage):
        yield part
    exchange.is_delivered = True


async def _is_done(exchange: Exchange, timeout_s: float | None = None) -> bool:
    """Waits until the reply is there, or has failed; false if neither comes in time."""
    done, _ = await asyncio.wait([exchange.reply], timeout=timeout_s)
    return bool(done)


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _json(error.body(), error.status)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
