"""Probes the learner's `/status` every second, with a deadline. It detects a frozen learner, which Redis does not.

Its answer also has what is not in Redis: group counts and present waits. Without a known address there is no probe.
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
    text: str = ""
    detail: str = ""
    for_s: float = 0.0


class LearnerStatus(msgspec.Struct):
    """The fields of its `/status` that control uses."""

    fencing_epoch: int = 0
    step: int = 0
    waits: list[LearnerWait] = []
    counts: dict[str, int] = {}
    group_stream_length: int = 0
    unread_groups: int | None = None


class LearnerProbe:
    """`follow` the learner's address from Redis; `status` is the latest answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._url = ""
        self._answered = time.monotonic()
        self.status: LearnerStatus | None = None
        """Kept when the learner stops answering."""
        self.is_answering = False

    def follow(self, url: str) -> None:
        """A new address is another learner; its silence counts from now on."""
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
                    raise ValueError("the answer is larger than a status")
        return msgspec.json.decode(body, type=LearnerStatus)
