"""The replicas of the run, by their heartbeats."""

import redis.asyncio

from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, WireError, decode_heartbeat


async def live_replicas(client: redis.asyncio.Redis, keys: Keys) -> list[Heartbeat]:
    """Of all that live, the one that asks included; what is no heartbeat is passed over."""
    names = [name async for name in client.scan_iter(match=keys.replicas + "*", count=1000)]
    found = []
    for payload in await client.mget(names) if names else []:
        try:
            found += [decode_heartbeat(payload)] if payload else []
        except WireError:
            continue
    return found
