"""Reads the heartbeats of the run's live replicas."""

import redis.asyncio

from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, WireError, decode_heartbeat


async def live_replicas(client: redis.asyncio.Redis, keys: Keys) -> list[Heartbeat]:
    """Heartbeats of all live replicas, including the caller's; undecodable ones are skipped."""
    names = [name async for name in client.scan_iter(match=keys.replicas + "*", count=1000)]
    found = []
    for payload in await client.mget(names) if names else []:
        try:
            found += [decode_heartbeat(payload)] if payload else []
        except WireError:
            continue
    return found
