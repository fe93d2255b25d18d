"""The tickets that a replica has leased, each with the task that processes it, and the replica's idle time."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, NamedTuple

from headrace.generation.tickets.store import Lease


class _Entry(NamedTuple):
    lease: Lease
    task: asyncio.Task[None]
    takes_slot: bool


class InFlight:
    """Tracks the leases in flight; `slot_freed` is set whenever one leaves."""

    def __init__(self) -> None:
        self.slot_freed = asyncio.Event()
        self._entries: dict[tuple[str, str], _Entry] = {}
        """By stream and entry id."""
        self._serving_since: float | None = None
        self._idle_since: float | None = None
        self._idle_s = 0.0

    def begin_serving(self) -> None:
        self._serving_since = self._idle_since = time.monotonic()

    def add(
        self, lease: Lease, work: Coroutine[Any, Any, None], tasks: asyncio.TaskGroup, takes_slot: bool = True
    ) -> None:
        """Runs `work` as one of `tasks`; the lease is in flight until it ends."""
        if self._idle_since is not None:
            self._idle_s += time.monotonic() - self._idle_since
            self._idle_since = None
        task = tasks.create_task(work, name=f"ticket {lease.ticket.id}")
        self._entries[lease.stream, lease.entry_id] = _Entry(lease, task, takes_slot)
        task.add_done_callback(lambda _: self._release(lease))

    def __contains__(self, lease: Lease) -> bool:
        return (lease.stream, lease.entry_id) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def num_slots_taken(self, stream: str) -> int:
        return sum(entry.takes_slot and entry.lease.stream == stream for entry in self._entries.values())

    @property
    def leases(self) -> list[Lease]:
        return [entry.lease for entry in self._entries.values()]

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [entry.task for entry in self._entries.values()]

    @property
    def is_serving(self) -> bool:
        return self._serving_since is not None

    @property
    def serving_s(self) -> float:
        return 0.0 if self._serving_since is None else time.monotonic() - self._serving_since

    @property
    def idle_s(self) -> float:
        """Seconds without a ticket in flight since serving began."""
        return self._idle_s + (0.0 if self._idle_since is None else time.monotonic() - self._idle_since)

    def _release(self, lease: Lease) -> None:
        del self._entries[lease.stream, lease.entry_id]
        self.slot_freed.set()
        if not self._entries:
            self._idle_since = time.monotonic()
