"""Leaves tickets that failed here to replicas that may do better, but never for long.

A ticket's `avoid` names the replicas that failed on it. One of them that leases it again holds it for `PASS_ON_S` and
hands it back, as long as somebody else is there who runs and has not failed on it; after `MAX_PASSES` it answers the
ticket itself, so that no ticket goes round for ever.
"""

import time

import redis.asyncio

from headrace.common.redis.keys import Keys
from headrace.common.wire import Ticket
from headrace.generation.tickets.peers import others

PASS_ON_S = 0.5
MAX_PASSES = 10
LOOK_INTERVAL_S = 1.0
MAX_COUNTED = 1000


class Passing:
    """One replica's counts of what it has passed on."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, replica: str) -> None:
        self._client = client
        self._keys = keys
        self._replica = replica
        self._num_passes: dict[str, int] = {}
        """By ticket, of the newest `MAX_COUNTED` that were passed on."""
        self._running: frozenset[str] = frozenset()
        self._looked_at = -LOOK_INTERVAL_S

    async def passes_on(self, ticket: Ticket) -> bool:
        """Whether this ticket, just leased, is for another replica; if so that is counted."""
        num_passes = self._num_passes.get(ticket.id, 0)
        if self._replica not in ticket.avoid or num_passes >= MAX_PASSES:
            return False
        if not (await self._running_replicas()).difference(ticket.avoid):
            return False
        self._num_passes.pop(ticket.id, None)
        self._num_passes[ticket.id] = num_passes + 1
        if len(self._num_passes) > MAX_COUNTED:
            del self._num_passes[next(iter(self._num_passes))]
        return True

    async def _running_replicas(self) -> frozenset[str]:
        """By their heartbeats; looked up at most once a second."""
        if time.monotonic() - self._looked_at >= LOOK_INTERVAL_S:
            found = await others(self._client, self._keys)
            self._running = frozenset(one.replica for one in found if one.state == "running")
            self._looked_at = time.monotonic()
        return self._running
