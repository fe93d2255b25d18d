"""Connections to Redis: one place for retries, deadlines and the check that it can be trusted to lose nothing.

A command that fails on a broken connection, or that the server refuses for the time being, is sent again with growing
pauses, on a new connection, until the outage has lasted the client's deadline; then the error is raised. `Waits` shows
the outage while it lasts. No error and no wait names the password. Every write of the project may therefore arrive
twice, and is written so that twice does no harm.
"""

from collections.abc import Callable, Iterator
from typing import Any

import redis
import redis.asyncio

from headrace.common.process.logs import redact
from headrace.common.process.waiting import Waits
from headrace.common.redis.address import make_async_client, make_client, parse_address
from headrace.common.redis.retry import AsyncRetry, CancellableConnection, Outage, SyncRetry

DEFAULT_DEADLINE_S = 30
"""The deadline of whoever starts, asks or tests."""
OUTAGE_DEADLINE_S = 300.0
"""The deadline of a running service."""
_TIMEOUTS = {"socket_timeout": 10.0, "socket_connect_timeout": 5.0}
"""Ten times what a blocking read asks for: whoever is silent for longer is frozen."""

DURABLE_SETTINGS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""What "nothing lost" means under `kill -9` of the server."""


def connect(
    url: str,
    waits: Waits | None = None,
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
    is_stopping: Callable[[], bool] = lambda: False,
    is_one_master: bool = False,
) -> redis.Redis:
    """For code that runs in threads. Does not connect yet. Nothing is retried once `is_stopping`. With `is_one_master`
    a failover of Sentinels raises `MasterChanged`."""
    retry = SyncRetry(_outage(url, waits, deadline_s, is_stopping))
    return make_client(url, is_one_master=is_one_master, retry=retry, **_TIMEOUTS)


def connect_async(
    url: str, waits: Waits | None = None, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> redis.asyncio.Redis:
    """For code that runs in an event loop. Does not connect yet. A task that is cancelled ends at once."""
    retry = AsyncRetry(_outage(url, waits, deadline_s, lambda: False))
    client = make_async_client(url, retry=retry, **_TIMEOUTS)
    pool = client.connection_pool
    pool.connection_class = type("Connection", (CancellableConnection, pool.connection_class), {})
    return client


def _outage(url: str, waits: Waits | None, deadline_s: float, is_stopping: Callable[[], bool]) -> Outage:
    address = parse_address(url)
    redact(address.password)
    return Outage(address.server, address.password, waits or Waits(), deadline_s, is_stopping)


def durability_problem(client: redis.Redis) -> str | None:
    """What this server would lose, and the setting that mends it; None if nothing."""
    try:
        found = {key: client.config_get(key).get(key) for key in DURABLE_SETTINGS}
    except redis.ResponseError:
        return "its CONFIG cannot be read, so that nobody knows whether it keeps what it is given"
    wrong = [
        f"{key} is {found[key]!r}, expected {wanted!r}"
        for key, wanted in DURABLE_SETTINGS.items()
        if found[key] != wanted
    ]
    return "; ".join(wrong) or None


def stream_entries(reply: Any) -> Iterator[tuple[str, bytes, dict[bytes, bytes]]]:
    """Stream, entry id and fields of everything that XREADGROUP answered, in either protocol of Redis.

    An entry that was deleted while it was pending comes without fields.
    """
    for stream, rows in reply.items() if isinstance(reply, dict) else reply or []:
        is_wrapped = rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], tuple)  # RESP3
        for entry_id, fields in rows[0] if is_wrapped else rows:
            yield stream.decode(), entry_id, fields or {}
