"""At most a share of the replicas swaps at the same time, and no replica waits for ever."""

import asyncio
import time

import pytest
import redis

from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, encode
from headrace.generation.weights import swap_slots
from headrace.generation.weights.swap_slots import SwapSlots
from tests.support.guard import GUARD_S

CASES = [(0.5, 8, 4), (0.3, 8, 2), (0.01, 8, 1), (0.5, 0, 1), (1.0, 8, 8)]


def live(client: redis.Redis, keys: Keys, count: int) -> None:
    for index in range(count):
        beat = Heartbeat(f"r{index}", "http://h:1", "running", "", 1, 0, 0, 0, 0.0, 1.0)
        client.set(keys.replica(f"r{index}"), encode(beat))


@pytest.mark.parametrize(("share", "num_live", "most"), CASES)
def test_at_most_a_share_swaps_at_the_same_time(
    redis_url: str, client: redis.Redis, keys: Keys, share: float, num_live: int, most: int
) -> None:
    """Each holds its slot until the maximum number of replicas holds one, or no other is left."""
    live(client, keys, num_live)
    swapping: set[int] = set()
    seen: list[int] = []
    full = asyncio.Event()

    async def swap(client: redis.asyncio.Redis, index: int) -> None:
        async with SwapSlots(client, keys, f"r{index}", share).acquire():
            swapping.add(index)
            seen.append(len(swapping))
            if len(swapping) >= most:
                full.set()
            await full.wait()
            await asyncio.sleep(0)
            swapping.discard(index)

    async def scenario() -> None:
        client = connect_async(redis_url)
        async with asyncio.timeout(GUARD_S):
            await asyncio.gather(*(swap(client, index) for index in range(8)))
        await client.aclose()

    asyncio.run(scenario())
    assert len(seen) == 8 and max(seen) == most
    assert client.zcard(keys.swap_slots) == 0


def test_a_replica_that_dies_with_a_slot_blocks_it_only_until_it_expires(
    redis_url: str, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_slots, "SLOT_TTL_S", 0.3)
    began_s = time.monotonic()
    seconds, microseconds = client.time()
    client.zadd(keys.swap_slots, {"dead": seconds * 1000 + microseconds // 1000 + 300})

    async def scenario() -> None:
        client = connect_async(redis_url)
        async with SwapSlots(client, keys, "a", 0.5).acquire():
            pass
        await client.aclose()

    asyncio.run(asyncio.wait_for(scenario(), GUARD_S))
    assert time.monotonic() - began_s > 0.2
