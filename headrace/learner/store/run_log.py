"""What the learner reports in Redis: its status, events, rows of metrics, and samples of groups."""

from collections.abc import Iterable
from typing import Any

import msgspec

from headrace.common.redis.keys import MAX_EVENTS, MAX_HISTORY, MAX_SAMPLES
from headrace.common.wire.group_samples import GroupSample
from headrace.learner.store.fenced_redis import Command, FencedRedis
from headrace.learner.store.row_numbers import numbers_of


class RunLog:
    def __init__(self, fenced: FencedRedis) -> None:
        self._fenced = fenced
        self._keys = fenced.keys
        newest: Any = fenced.client.xrevrange(self._keys.events, count=1)
        self._seen_event = newest[0][0].decode() if newest else "0"

    def set_status(self, status: dict[str, Any]) -> None:
        """Sets fields of the learner's hash, which the page and the command line show."""
        fields = [str(part) for pair in status.items() for part in pair]
        self._fenced.execute([("HSET", self._keys.learner, *fields)])

    def add_event(self, kind: str, event: dict[str, Any]) -> None:
        self._fenced.execute([self._event(kind, event)])

    def append_row(self, kind: str, row: dict[str, Any]) -> None:
        """Adds the row of a step or an evaluation: as an event, and its numbers to the history."""
        numbers = msgspec.json.encode(numbers_of(row))
        history = ("XADD", self._keys.history, "MAXLEN", "~", MAX_HISTORY, "*", "kind", kind, "row", numbers)
        self._fenced.execute([self._event(kind, row), history])

    def add_samples(self, groups: Iterable[GroupSample]) -> None:
        self._fenced.execute([self._sample(group) for group in groups])

    def take_swap_pauses_ms(self) -> list[float]:
        """How long replicas paused for weight swaps since the last call, in milliseconds."""
        found: Any = self._fenced.client.xrange(self._keys.events, min=f"({self._seen_event}", count=MAX_EVENTS)
        if found:
            self._seen_event = found[-1][0].decode()
        swaps = [msgspec.json.decode(fields[b"event"]) for _, fields in found if fields[b"kind"] == b"weight_swap"]
        return [swap["pause_ms"] for swap in swaps]

    def _sample(self, group: GroupSample) -> Command:
        fields = ("id", group.id, "kind", group.kind, "state", group.state, "step", group.step)
        payload = msgspec.json.encode(group)
        return ("XADD", self._keys.samples, "MAXLEN", "~", MAX_SAMPLES, "*", *fields, "group", payload)

    def _event(self, kind: str, event: dict[str, Any]) -> Command:
        payload = msgspec.json.encode(event)
        return ("XADD", self._keys.events, "MAXLEN", "~", MAX_EVENTS, "*", "kind", kind, "event", payload)
