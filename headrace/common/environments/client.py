"""The HTTP client behind `Chat`: sends a request to an OpenAI-compatible endpoint, again where nothing came of it.

A repetition carries `x-stainless-retry-count`, as those of OpenAI's own clients do, so the gateway answers it with the
reply of the first request.
"""

import asyncio
import uuid
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, cast

import aiohttp
import msgspec

from headrace.common.environments.chat import ChatError
from headrace.common.environments.reply import Limit
from headrace.common.http.addresses import bearer_header

RETRY_PAUSE_S = 0.5
MAX_RETRY_PAUSE_S = 8.0

NO_ROOM = "context_length_exceeded"
"""OpenAI's code for a conversation that fills the context."""


class ChatClient:
    """The connections of one event loop; many conversations share them."""

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, json_serialize=_to_json
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def sample(self, base_url: str, api_key: str, body: dict[str, Any]) -> dict[str, Any] | Limit:
        """The choice that the endpoint answers with, or the limit at which it samples none.

        While the endpoint cannot be reached, or cannot answer now, the request is sent again: whoever calls has a
        deadline. Raises `ChatError` if the request is refused.
        """
        num_tries, pause_s = 0, RETRY_PAUSE_S
        headers = bearer_header(api_key) | {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            headers["x-stainless-retry-count"] = str(num_tries)
            try:
                async with self._http.post(f"{base_url}/chat/completions", json=body, headers=headers) as response:
                    status, content = response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError):
                status, content = int(HTTPStatus.SERVICE_UNAVAILABLE), b""
            if status != HTTPStatus.SERVICE_UNAVAILABLE:
                return _choice(status, content)
            num_tries += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_RETRY_PAUSE_S)


def _choice(status: int, content: bytes) -> dict[str, Any] | Limit:
    try:
        reply = msgspec.json.decode(content, type=dict[str, Any])
        if status == HTTPStatus.OK:
            choice: dict[str, Any] = reply["choices"][0]
            limit = choice.get("limit")
            return choice if limit is None else cast(Limit, limit)
        error = reply["error"]
        if error.get("code") == NO_ROOM:
            return "context"
        reason = error["message"]
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError, AttributeError):
        reason = content[:200].decode(errors="replace")
    raise ChatError(f"the model's endpoint answered {status}: {reason}")


def _to_json(body: Any) -> str:
    return msgspec.json.encode(body).decode()
