"""Decides whether a ticket that failed on this replica is left to another one.

A ticket's `avoid` names the replicas that failed on it. If one of them leases it again, it waits for
`HAND_BACK_DELAY_S` and hands the ticket back, as long as another running replica has not failed on it. After
`MAX_HAND_BACKS` it processes the ticket, so that no ticket is handed around for ever.
"""

import time

import redis.asyncio

from headrace.common.redis.keys import Keys
from headrace.common.wire import Ticket
from headrace.generation.tickets.peers import live_replicas

HAND_BACK_DELAY_S = 0.5
MAX_HAND_BACKS = 10
POLL_INTERVAL_S = 1.0
MAX_COUNTED = 1000


class RetryElsewhere:
    """One replica's counts of the tickets it has handed back."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, replica: str) -> None:
        self._client = client
        self._keys = keys
        self._replica = replica
        self._num_hand_backs: dict[str, int] = {}
        """By ticket id, for the latest `MAX_COUNTED` tickets handed back."""
        self._running: frozenset[str] = frozenset()
        self._polled_at = -POLL_INTERVAL_S

    async def should_hand_back(self, ticket: Ticket) -> bool:
        """Whether to leave this ticket, just leased, to another replica; True is counted as a hand-back."""
        num_hand_backs = self._num_hand_backs.get(ticket.id, 0)
        if self._replica not in ticket.avoid or num_hand_backs >= MAX_HAND_BACKS:
            return False
        if not (await self._running_replicas()).difference(ticket.avoid):
            return False
        self._num_hand_backs.pop(ticket.id, None)
        self._num_hand_backs[ticket.id] = num_hand_backs + 1
        if len(self._num_hand_backs) > MAX_COUNTED:
            del self._num_hand_backs[next(iter(self._num_hand_backs))]
        return True

    async def _running_replicas(self) -> frozenset[str]:
        """Names from the heartbeats, read at most once per `POLL_INTERVAL_S`."""
        if time.monotonic() - self._polled_at >= POLL_INTERVAL_S:
            found = await live_replicas(self._client, self._keys)
            self._running = frozenset(one.replica for one in found if one.state == "running")
            self._polled_at = time.monotonic()
        return self._running
