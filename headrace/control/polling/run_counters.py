"""Counters since control's start, for its `/metrics`: steps, swaps by replica, and its own polls of Redis."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.common.metrics.families import SHORT_S, Families, Histogram
from headrace.common.metrics.run import GroupTotals
from headrace.common.metrics.steps import StepTotals
from headrace.common.metrics.swaps import SwapTotals
from headrace.control.models.history import Event

MAX_REPLICAS = 1000
"""Largest number of replicas whose swaps are counted."""


class RunCounters:
    def __init__(self) -> None:
        self.groups = GroupTotals()
        self._polled_at = time.time()
        self._polls = Histogram(SHORT_S)
        self._steps = StepTotals()
        self._swaps: dict[str, SwapTotals] = {}

    def observe_poll(self, seconds: float) -> None:
        self._polls.observe(seconds)
        self._polled_at = time.time()

    def add(self, rows: Iterable[tuple[str, Any]], events: Iterable[Event]) -> None:
        for kind, row in rows:
            if kind == "step":
                self._steps.add(row)
        for event in events:
            if event.kind == "weight_swap":
                self._add_swap(event.data)

    def _add_swap(self, event: Mapping[str, Any]) -> None:
        """Ignores fields that are not numbers."""
        replica, num_bytes = event.get("replica"), event.get("bytes")
        if not isinstance(replica, str) or (replica not in self._swaps and len(self._swaps) >= MAX_REPLICAS):
            return
        named = {phase: event.get(f"{phase}_ms") for phase in ("pause", "fetch", "apply", "load", "confirm")}
        seconds = {phase: value / 1e3 for phase, value in named.items() if isinstance(value, int | float)}
        self._swaps.setdefault(replica, SwapTotals()).add(num_bytes if isinstance(num_bytes, int) else 0, seconds)

    def collect(self, families: Families) -> None:
        self._steps.collect(families)
        for replica, totals in self._swaps.items():
            totals.collect(families, replica)
        text = "Time of a poll of Redis."
        families.histogram("headrace_control_poll_duration_seconds", text, self._polls)
        text = "When Redis last answered control, or else control began."
        families.gauge("headrace_control_latest_poll_timestamp_seconds", text, self._polled_at)
