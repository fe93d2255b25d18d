"""Limits on a request to a service: its size, the time to send it, and the time to read the response.

A client that sends slowly, or never reads, holds only one connection and a bounded buffer, for a bounded time.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.common.http.problems import problem_response

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 10.0
HEAD_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 20.0
MAX_CONNECTIONS = 800
"""Below the usual limit of 1024 open files."""
CLOSING = {"Connection": "close"}
"""Header of an early error response: the rest of the request is not read."""
KEEP_ALIVE_S = 20


class BoundedBody:
    """ASGI middleware: passes a request on once its body has arrived; answers 413 (too large) or 408 (too slow)."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await self._read(receive)
        except TimeoutError:
            await problem_response(408, f"the request did not arrive within {BODY_TIMEOUT_S:g} s", CLOSING)(
                scope, receive, send
            )
            return
        if body is None:
            await problem_response(413, f"the request is larger than {self.max_bytes} bytes", CLOSING)(
                scope, receive, send
            )
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large or the client has disconnected."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


class BoundedConnection(H11Protocol):
    """A connection that is closed if the client does not send a request's head, or does not read, in time."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._deadline is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        self._cancel()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
