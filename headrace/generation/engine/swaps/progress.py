"""Requests in flight make progress between two swaps.

Without a wait, versions that arrive faster than KV caches are recomputed would leave each request one token per
version, or none.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from headrace.generation.engine.http_calls import EngineCalls, EngineError
from headrace.generation.engine.swaps.swapping import SwapTimings

RECOMPUTE_TIMEOUT_S = 60.0
POLL_S = 0.02
ONE_TOKEN = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}


class RequestProgress:
    """Of one engine. `recomputes`: whether it computes KV caches again after a swap."""

    def __init__(self, calls: EngineCalls, recomputes: bool) -> None:
        self._calls = calls
        self._recomputes = recomputes
        self._in_flight: set[object] = set()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """A request is in flight during the block."""
        request = object()
        self._in_flight.add(request)
        try:
            yield
        finally:
            self._in_flight.discard(request)

    async def wait(self, swapped: SwapTimings) -> None:
        """Returns when the requests in flight have ended, or have run as long as the swap and recomputation took."""
        in_flight = set(self._in_flight) if self._recomputes else set()
        going_on = asyncio.create_task(self._wait_for_recompute(swapped))
        try:
            while not (going_on.done() or in_flight.isdisjoint(self._in_flight)):
                await asyncio.wait([going_on], timeout=POLL_S)
        finally:
            going_on.cancel()

    async def _wait_for_recompute(self, swapped: SwapTimings) -> None:
        """Sends a one-token request and waits for as long again as the swap took.

        SGLang recomputes retracted requests in the order of arrival, so the reply means that they have been recomputed.
        """
        asked_s = time.monotonic()
        with suppress(EngineError):  # the engine is down, or so slow that it has had enough time
            await self._calls.call("/generate", msgspec.Raw, ONE_TOKEN, RECOMPUTE_TIMEOUT_S)
            await asyncio.sleep(swapped.pause_s + swapped.confirm_s + time.monotonic() - asked_s)
