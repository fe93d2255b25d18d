"""HTTP calls to one SGLang server: each has a deadline, and returns a typed reply or raises `EngineError`.

Nothing is retried, except a GET on a connection that the server was closing. The time of the engine's last sign of
life is kept.
"""

import math
import time
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import msgspec

CONTROL_TIMEOUT_S = 30.0
KEEPALIVE_EXPIRY_S = 2.0
"""Below SGLang's own 5 s, so that a request never goes into a connection that the server is closing."""
SIGNS_OF_LIFE = ("/generate", "/update_weights_from_disk", "/health", "/weights_checker", "/server_info")
"""Paths that SGLang answers only if its scheduler is alive; its HTTP process answers the others alone."""

Reply = TypeVar("Reply")


class EngineError(RuntimeError):
    """The engine failed, could not be reached, or sent an unusable reply."""


class EngineFault(EngineError):
    """The engine answered with a status of 500 or more: it failed on what it was sent."""


class EngineCalls:
    """Calls the server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.last_heard_at = -math.inf
        """`time.monotonic()` of the last sign of life."""
        self._http: aiohttp.ClientSession | None = None
        """Created at the first call, because it belongs to an event loop."""

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def call(
        self, path: str, reply_type: type[Reply], body: Any = None, timeout_s: float | None = CONTROL_TIMEOUT_S
    ) -> Reply:
        """Sends a POST with `body`, or a GET without one, and decodes the reply."""
        content = await self.send("GET" if body is None else "POST", path, body, timeout_s)
        try:
            return msgspec.json.decode(content, type=reply_type)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise EngineError(f"the reply to {path} cannot be decoded ({error}): {content[:200]!r}") from error

    async def send(self, method: str, path: str, body: Any, timeout_s: float | None) -> bytes:
        if self._http is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_EXPIRY_S)
            self._http = aiohttp.ClientSession(connector=connector, json_serialize=_to_json)
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            request = self._http.request(method, self.url + path, json=body, timeout=timeout, allow_redirects=False)
            async with request as response:
                content = await response.read()
        except TimeoutError as error:
            raise EngineError(f"{path} at {self.url}: no answer within {timeout_s} s") from error
        except aiohttp.ClientError as error:
            raise EngineError(f"{path} at {self.url}: {type(error).__name__}: {error}") from error
        if response.status != HTTPStatus.OK:
            failure = EngineFault if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR else EngineError
            raise failure(f"{path} answered {response.status}: {content.decode(errors='replace')[:500]}")
        if path in SIGNS_OF_LIFE:
            self.last_heard_at = time.monotonic()
        return content


def _to_json(body: Any) -> str:
    return msgspec.json.encode(body).decode()
