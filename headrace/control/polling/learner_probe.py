"""Asks the learner how it is, so that a frozen one is seen: what stands in Redis of it looks as well as ever.

Its answer also has what Redis does not: how groups were counted, and what it waits for. Asked every second, with a
deadline; whoever has told no address is not asked.
"""

import asyncio
import contextlib
import time

import httpx
import msgspec

from headrace.common.wire.checks import is_url

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 1 << 20


class LearnerWait(msgspec.Struct):
    reason: str
    detail: str = ""
    for_s: float = 0.0


class LearnerStatus(msgspec.Struct):
    """Of its `/status` what is used here."""

    epoch: int = 0
    step: int = 0
    waits: list[LearnerWait] = []
    counts: dict[str, int] = {}


class LearnerProbe:
    """`follow` the address that Redis tells; `status` is the latest answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._url = ""
        self._answered = time.monotonic()
        self.status: LearnerStatus | None = None
        """Kept when it stops answering."""
        self.is_answering = False

    def follow(self, url: str) -> None:
        """Another address is another learner, and has from now on to answer."""
        if url != self._url:
            self._url, self._answered, self.is_answering = url, time.monotonic(), False

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._answered if self._url else 0.0

    async def run(self) -> None:
        while True:
            if self._url:
                await self.ask()
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def ask(self) -> None:
        url, status = self._url, None
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError, TimeoutError):
            if is_url(url):
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    status = await self._fetch(f"{url}/status")
        if url != self._url:
            return
        self.is_answering = status is not None
        if status is not None:
            self.status, self._answered = status, time.monotonic()

    async def _fetch(self, url: str) -> LearnerStatus:
        async with self._client.stream("GET", url) as response:
            response.raise_for_status()
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError("more than a status")
        return msgspec.json.decode(body, type=LearnerStatus)
