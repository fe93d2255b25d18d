"""Sends commits that are due at the same time to Redis in one round trip.

While a batch is being sent, new commits wait and form the next batch. So no commit waits for others to join it, and a
replica that finishes many groups a second makes fewer calls than it has groups. Each item gets its own result, or the
batch's error. No item is sent twice.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 8 << 20
"""The limit bounds how long one script call blocks Redis."""

T = TypeVar("T")


@dataclass
class _Batch(Generic[T]):
    items: list[T] = field(default_factory=list)
    num_bytes: int = 0
    num_waiting: int = 0
    sent: asyncio.Task[list[bool]] | None = None


class Batcher(Generic[T]):
    """Groups items of `add` into batches for `send`, which returns one result for each item, in order."""

    def __init__(self, send: Callable[[list[T]], Awaitable[list[bool]]]) -> None:
        self._send = send
        self._turn = asyncio.Lock()
        self._open: _Batch[T] | None = None

    async def add(self, item: T, num_bytes: int) -> bool:
        """The result for `item`. If the call is cancelled, the item may or may not have been sent."""
        batch = self._batch_for(num_bytes)
        index = len(batch.items)
        batch.items.append(item)
        batch.num_bytes += num_bytes
        batch.num_waiting += 1
        assert batch.sent is not None
        try:
            return (await asyncio.shield(batch.sent))[index]
        finally:
            batch.num_waiting -= 1
            if not batch.num_waiting:
                batch.sent.cancel()  # no caller is left

    def _batch_for(self, num_bytes: int) -> _Batch[T]:
        batch = self._open
        if batch and len(batch.items) < MAX_BATCH_ITEMS and batch.num_bytes + num_bytes <= MAX_BATCH_BYTES:
            return batch
        self._open = batch = _Batch()
        batch.sent = asyncio.create_task(self._send_in_turn(batch), name="commits")
        return batch

    async def _send_in_turn(self, batch: _Batch[T]) -> list[bool]:
        try:
            async with self._turn:
                self._close(batch)
                return await self._send(batch.items)
        finally:
            self._close(batch)

    def _close(self, batch: _Batch[T]) -> None:
        if self._open is batch:
            self._open = None
