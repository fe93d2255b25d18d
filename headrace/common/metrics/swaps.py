"""Metrics of a replica's weight swaps, counted by the replica, and by control from the run's events."""

from collections.abc import Mapping

from headrace.common.metrics.families import LONG_S, SHORT_S, Families, Histogram

SWAP_PHASES = ("apply", "load", "confirm")


class SwapTotals:
    def __init__(self) -> None:
        self._num_bytes = 0
        self._pauses = Histogram(SHORT_S)
        self._fetches = Histogram(LONG_S)
        self._phases = {phase: Histogram(SHORT_S) for phase in SWAP_PHASES}

    def add(self, num_bytes: int, seconds: Mapping[str, float]) -> None:
        """`seconds`: durations of pause, fetch and the known ones of `SWAP_PHASES`."""
        self._num_bytes += num_bytes
        for phase, histogram in ({"pause": self._pauses, "fetch": self._fetches} | self._phases).items():
            if phase in seconds:
                histogram.observe(seconds[phase])

    def collect(self, families: Families, replica: str) -> None:
        one = {"replica": replica}
        text = "Time that generation pauses for a new version."
        families.histogram("headrace_replica_swap_pause_seconds", text, self._pauses, **one)
        text = "Time to fetch a version, while generation goes on."
        families.histogram("headrace_replica_swap_fetch_seconds", text, self._fetches, **one)
        text = "Time of a swap by phase: apply the deltas (before the pause), load (within it), confirm (after it)."
        for phase, histogram in self._phases.items():
            families.histogram("headrace_replica_swap_phase_seconds", text, histogram, phase=phase, **one)
        text = "Bytes received for the versions that the replica has served."
        families.counter("headrace_replica_version_bytes_total", text, self._num_bytes, **one)
