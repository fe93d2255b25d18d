"""Swap slots: a semaphore in Redis that limits the share of the run's replicas that swap weights at the same time.

A slot is an entry with an expiry in a sorted set of the run. A replica that dies with a slot blocks it for `SLOT_TTL_S`
at most. No replica waits longer than that for a slot.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import redis.asyncio

from headrace.common.redis.keys import Keys
from headrace.generation.tickets.peers import live_replicas

SLOT_TTL_S = 30.0
POLL_S = 0.02
_ACQUIRE = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
return 1
"""
"""KEYS: swapping. ARGV: replica, how many may swap, milliseconds of a turn."""
_log = logging.getLogger(__name__)


class SwapSlots:
    """One replica's access to the slots. Their number is `share` of the live replicas, and at least one."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, replica: str, share: float) -> None:
        self._client = client
        self._keys = keys
        self._replica = replica
        self._share = share
        self._acquire = client.register_script(_ACQUIRE)

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[None]:
        """Holds a slot for the block. If none is free within `SLOT_TTL_S`, the block runs without one."""
        if self._share >= 1.0:
            yield
            return
        num_live = len(await live_replicas(self._client, self._keys))
        arguments = [self._replica, max(1, int(self._share * num_live)), int(SLOT_TTL_S * 1000)]
        deadline_s = time.monotonic() + SLOT_TTL_S
        while not await self._acquire(keys=[self._keys.swap_slots], args=arguments):
            if time.monotonic() > deadline_s:
                _log.warning("no swap slot was free within %g s; swapping without one", SLOT_TTL_S)
                break
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            with contextlib.suppress(redis.RedisError):  # the slot will expire
                await self._client.zrem(self._keys.swap_slots, self._replica)
