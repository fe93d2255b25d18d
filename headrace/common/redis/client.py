"""Clients of Redis: retries, deadlines, and the check that the server loses no acknowledged write.

A command that fails on a broken connection, or that the server refuses for now, is sent again with growing pauses, on a
new connection, until the outage has lasted the client's deadline; then the error is raised. `Waits` shows the outage
while it lasts. No error and no wait contains the password. Because of retries a write may arrive twice; every write of
the project is therefore idempotent.
"""

from collections.abc import Callable, Iterator
from typing import Any

import redis
import redis.asyncio

from headrace.common.process.logs import redact
from headrace.common.process.waiting import Waits
from headrace.common.redis.address import make_async_client, make_client, parse_address
from headrace.common.redis.outage import Outage
from headrace.common.redis.retry import AsyncRetry, CancellableConnection, SyncRetry

DEFAULT_DEADLINE_S = 30
"""Deadline of commands, of services that start, and of tests."""
OUTAGE_DEADLINE_S = 300.0
"""Deadline of a running service."""
_TIMEOUTS = {"socket_timeout": 10.0, "socket_connect_timeout": 5.0}
"""Ten times as long as a blocking read waits: a server that is silent for longer hangs."""

DURABLE_SETTINGS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""The server's settings with which no acknowledged write is lost, even after `kill -9`."""


def connect(
    url: str,
    waits: Waits | None = None,
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
    is_stopping: Callable[[], bool] = lambda: False,
    is_one_master: bool = False,
) -> redis.Redis:
    """A client for threads, which connects at its first command.

    Once `is_stopping` returns true, nothing is retried. With `is_one_master`, a failover raises `MasterChanged`.
    """
    retry = SyncRetry(_outage(url, waits, deadline_s, is_stopping))
    return make_client(url, is_one_master=is_one_master, retry=retry, **_TIMEOUTS)


def connect_async(
    url: str, waits: Waits | None = None, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> redis.asyncio.Redis:
    """A client for an event loop, which connects at its first command. A cancelled task ends at once."""
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
    """The server settings with which writes could be lost, and the expected values; None if there are none."""
    try:
        found = {key: client.config_get(key).get(key) for key in DURABLE_SETTINGS}
    except redis.ResponseError:
        return "its CONFIG cannot be read, so whether it may lose writes is unknown"
    wrong = [
        f"{key} is {found[key]!r}, expected {wanted!r}"
        for key, wanted in DURABLE_SETTINGS.items()
        if found[key] != wanted
    ]
    return "; ".join(wrong) or None


def stream_entries(reply: Any) -> Iterator[tuple[str, bytes, dict[bytes, bytes]]]:
    """Stream, entry id and fields of every entry in a reply to XREADGROUP, by either protocol of Redis.

    An entry that was deleted while it was pending has no fields.
    """
    for stream, rows in reply.items() if isinstance(reply, dict) else reply or []:
        is_wrapped = rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], tuple)  # RESP3
        for entry_id, fields in rows[0] if is_wrapped else rows:
            yield stream.decode(), entry_id, fields or {}
