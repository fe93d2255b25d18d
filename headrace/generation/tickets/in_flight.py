"""The tickets that a replica holds, each with the task that deals with it, and how long it had none."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, NamedTuple

from headrace.generation.tickets.store import Lease


class _Held(NamedTuple):
    lease: Lease
    task: asyncio.Task[None]
    takes_slot: bool


class InFlight:
    """`slot_freed` is set whenever one leaves."""

    def __init__(self) -> None:
        self.slot_freed = asyncio.Event()
        self._held: dict[tuple[str, str], _Held] = {}
        """By stream and entry id."""
        self._serving_since: float | None = None
        self._idle_since: float | None = None
        self._idle_s = 0.0

    def begin_serving(self) -> None:
        self._serving_since = self._idle_since = time.monotonic()

    def hold(
        self, lease: Lease, work: Coroutine[Any, Any, None], tasks: asyncio.TaskGroup, takes_slot: bool = True
    ) -> None:
        """Does the work as one of `tasks`."""
        if self._idle_since is not None:
            self._idle_s += time.monotonic() - self._idle_since
            self._idle_since = None
        task = tasks.create_task(work, name=f"ticket {lease.ticket.id}")
        self._held[lease.stream, lease.entry_id] = _Held(lease, task, takes_slot)
        task.add_done_callback(lambda _: self._release(lease))

    def __contains__(self, lease: Lease) -> bool:
        return (lease.stream, lease.entry_id) in self._held

    def __len__(self) -> int:
        return len(self._held)

    def num_slots_taken(self, stream: str) -> int:
        return sum(held.takes_slot and held.lease.stream == stream for held in self._held.values())

    @property
    def leases(self) -> list[Lease]:
        return [held.lease for held in self._held.values()]

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [held.task for held in self._held.values()]

    @property
    def is_serving(self) -> bool:
        return self._serving_since is not None

    @property
    def serving_s(self) -> float:
        return 0.0 if self._serving_since is None else time.monotonic() - self._serving_since

    @property
    def idle_s(self) -> float:
        """Without any ticket, since serving began."""
        return self._idle_s + (0.0 if self._idle_since is None else time.monotonic() - self._idle_since)

    def _release(self, lease: Lease) -> None:
        del self._held[lease.stream, lease.entry_id]
        self.slot_freed.set()
        if not self._held:
            self._idle_since = time.monotonic()
