"""The services' HTTP servers: token authorisation, and a server for a thread or an event loop.

Reading is open on the address that the service binds to (loopback by default). Every route that changes state depends
on `require_token`.
"""

import asyncio
import contextlib
import hmac
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from headrace.common.http.host_header import HostHeaderCheck, is_loopback
from headrace.common.http.limits import (
    KEEP_ALIVE_S,
    MAX_BODY_BYTES,
    MAX_CONNECTIONS,
    BoundedBody,
    BoundedConnection,
)
from headrace.common.http.problems import add_problem_handlers

STARTUP_TIMEOUT_S = 30.0


def require_token(token: str) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency that answers 401 without the run's token."""
    assert token, "an empty token would let everybody in"
    expected = f"Bearer {token}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise HTTPException(401, "this call needs the run's token: Authorization: Bearer …")

    return check


def new_app(title: str, max_body_bytes: int = MAX_BODY_BYTES, **settings: Any) -> FastAPI:
    """An app whose errors are problem details and whose requests are bounded in size and time."""
    app = FastAPI(title=title, **settings)
    app.add_middleware(BoundedBody, max_bytes=max_body_bytes)
    add_problem_handlers(app)
    return app


class Server(uvicorn.Server):
    """A service's HTTP server, with the limits of `headrace.common.http.limits`.

    On loopback it accepts only loopback's names. It leaves signals to its process and ignores proxy headers.
    """

    def __init__(self, app: FastAPI, sock: socket.socket) -> None:
        config = uvicorn.Config(
            HostHeaderCheck(app) if is_loopback(sock.getsockname()[0]) else app,
            http=BoundedConnection,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
            log_level="warning",
            log_config=None,
            proxy_headers=False,
            server_header=False,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve_in_loop(app: FastAPI, sock: socket.socket) -> AsyncIterator[None]:
    """Serves the app in this event loop until the block ends."""
    server = Server(app, sock)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@contextlib.contextmanager
def serve_in_thread(app: FastAPI, sock: socket.socket) -> Iterator[None]:
    """Serves the app in a thread until the block ends."""
    server = Server(app, sock)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STARTUP_TIMEOUT_S)
        sock.close()
