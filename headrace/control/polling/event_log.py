"""The latest events of a run, each with one line of text, and the swap pauses of each replica.

Steps are not included; they are in the history. Swaps are frequent and kept separately, so that they do not push out
other events.
"""

import statistics
from collections import deque
from typing import Any

import msgspec

from headrace.common.wire import one_line
from headrace.control.models.history import Event
from headrace.control.models.replicas import SwapPauses
from headrace.control.polling.redis_poll import Entry, parse_entry_id

MAX_SWAPS = 200
MAX_OTHER_EVENTS = 500
MAX_EVENT_BYTES = 1 << 16
MAX_REPLICAS = 1000
"""Largest number of replicas whose swaps are remembered."""


class _SwapDurations:
    """The swaps of one replica."""

    def __init__(self) -> None:
        self.count = 0
        self.pauses_ms: deque[float] = deque(maxlen=100)
        self.fetched_bytes = 0

    def add(self, event: dict[str, Any]) -> None:
        self.count += 1
        if isinstance(pause := event.get("pause_ms"), int | float):
            self.pauses_ms.append(float(pause))
        if isinstance(num_bytes := event.get("bytes"), int):
            self.fetched_bytes = num_bytes

    def pauses(self) -> SwapPauses:
        known = sorted(self.pauses_ms)
        return SwapPauses(
            count=self.count,
            p50_ms=statistics.median(known) if known else None,
            p95_ms=known[min(len(known) - 1, int(0.95 * len(known)))] if known else None,
            latest_ms=self.pauses_ms[-1] if known else None,
            fetched_bytes=self.fetched_bytes,
        )


class EventLog:
    def __init__(self) -> None:
        self._swaps: deque[Event] = deque(maxlen=MAX_SWAPS)
        self._others: deque[Event] = deque(maxlen=MAX_OTHER_EVENTS)
        self._by_replica: dict[str, _SwapDurations] = {}

    def add(self, entry: Entry) -> Event | None:
        """Adds an entry; returns its event, or None for steps and invalid entries."""
        entry_id, fields = entry
        kind, payload = fields.get(b"kind", b"").decode(errors="replace"), fields.get(b"event", b"")
        if kind == "step" or len(payload) > MAX_EVENT_BYTES:
            return None
        try:
            found = msgspec.json.decode(payload, type=dict[str, Any])
        except (ValueError, RecursionError):
            return None
        at = parse_entry_id(entry_id)[0] / 1000
        event = Event(id=entry_id, at=at, kind=one_line(kind), text=one_line(describe_event(kind, found)), data=found)
        if kind == "weight_swap":
            self._note_swap(found)
        (self._swaps if kind == "weight_swap" else self._others).append(event)
        return event

    def newest(self, limit: int) -> list[Event]:
        merged = sorted([*self._swaps, *self._others], key=lambda event: parse_entry_id(event.id), reverse=True)
        return merged[:limit]

    def pauses(self, replica: str) -> SwapPauses:
        return self._by_replica.get(replica, _SwapDurations()).pauses()

    def _note_swap(self, event: dict[str, Any]) -> None:
        replica = event.get("replica")
        if isinstance(replica, str) and (replica in self._by_replica or len(self._by_replica) < MAX_REPLICAS):
            self._by_replica.setdefault(replica, _SwapDurations()).add(event)


def describe_event(kind: str, event: dict[str, Any]) -> str:
    """One line for people, even if fields are missing."""

    def number(name: str, form: str) -> str:
        value = event.get(name)
        return format(value, form) if isinstance(value, int | float) else "?"

    if isinstance(text := event.get("text"), str):
        return text
    if kind == "weight_swap":
        version, paused_ms = event.get("weight_version"), number("pause_ms", ".0f")
        return f"{event.get('replica')} uses weight version {version}; paused {paused_ms} ms"
    if kind == "evaluation":
        return f"held-out pass@1 {number('held_out', '.3f')} after step {event.get('step')}"
    if kind == "redis_lost":
        return f"Redis lost its data after step {event.get('step')}; {event.get('num_reissued')} tickets reissued"
    shown = ", ".join(
        f"{name} {value}" for name, value in list(event.items())[:8] if not isinstance(value, list | dict)
    )
    return f"{kind}: {shown}" if shown else kind
