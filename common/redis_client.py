"""Connections to Redis: one place for retries, deadlines and the check that it can be trusted to lose nothing.

A command that fails on a broken connection is sent again, with growing pauses, for about `RETRY_S` seconds and
then raises. Every write of the project may therefore arrive twice, and is written so that twice does no harm.
"""

from collections.abc import Iterator
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

RETRY_S = 30
_BACKOFF = ExponentialBackoff(cap=1.0, base=0.05)
_NUM_RETRIES = RETRY_S + 4
_ERRORS: list[type[Exception]] = [redis.ConnectionError, redis.TimeoutError, ConnectionError]

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""What "nothing lost" means under `kill -9` of the server."""


def connect(url: str) -> redis.Redis:
    """For code that runs in threads. Does not connect yet."""
    return redis.Redis.from_url(
        url,
        retry=Retry(_BACKOFF, _NUM_RETRIES),
        retry_on_error=_ERRORS,
        socket_timeout=30.0,
        socket_connect_timeout=5.0,
    )


def connect_async(url: str) -> redis.asyncio.Redis:
    """For code that runs in an event loop. Does not connect yet."""
    return redis.asyncio.Redis.from_url(
        url,
        retry=AsyncRetry(_BACKOFF, _NUM_RETRIES),
        retry_on_error=_ERRORS,
        socket_timeout=30.0,
        socket_connect_timeout=5.0,
    )


def durability_problem(client: redis.Redis) -> str | None:
    """What this server would lose, and the setting that mends it; None if nothing."""
    try:
        found = {key: client.config_get(key).get(key) for key in DURABLE}
    except redis.ResponseError:
        return "its CONFIG cannot be read, so that nobody knows whether it keeps what it is given"
    wrong = [f"{key} is {found[key]!r}, expected {wanted!r}" for key, wanted in DURABLE.items() if found[key] != wanted]
    return "; ".join(wrong) or None


def entries_of(reply: Any) -> Iterator[tuple[str, bytes, dict[bytes, bytes]]]:
    """Stream, entry id and fields of everything that XREADGROUP answered, in either protocol of Redis.

    An entry that was deleted while it was pending comes without fields.
    """
    for stream, rows in reply.items() if isinstance(reply, dict) else reply or []:
        is_wrapped = rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], tuple)  # RESP3
        for entry_id, fields in rows[0] if is_wrapped else rows:
            yield stream.decode(), entry_id, fields or {}
