"""Metric families, made at each scrape from the present values of the service's objects.

Names are Prometheus' convention: base units at the end (`_seconds`, `_bytes`), `_total` of what only grows while the
process lives.
"""

import bisect
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import Metric

SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """A histogram: counts observations by upper bound. Safe to use from any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[str, int]], float]:
        """The cumulative count per bound (as Prometheus writes it), and the sum of all observations."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        texts = [*map(str, self._bounds[:-1]), "+Inf"]
        return list(zip(texts, itertools.accumulate(counts), strict=True)), total


class Families:
    """Families by name, in the order of their first sample. A sample whose value is None is left out."""

    def __init__(self, **labels: str) -> None:
        """`labels` are added to every sample."""
        self._labels = labels
        self._found: dict[str, Metric] = {}

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._found.values())

    def gauge(self, name: str, text: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self._family(name, text, "gauge").add_sample(name, self._labels | labels, value)

    def counter(self, name: str, text: str, value: float | None, **labels: str) -> None:
        if value is not None:
            assert name.endswith("_total"), name
            self._family(name.removesuffix("_total"), text, "counter").add_sample(name, self._labels | labels, value)

    def histogram(self, name: str, text: str, histogram: Histogram, **labels: str) -> None:
        buckets, total = histogram.read()
        family, labels = self._family(name, text, "histogram"), self._labels | labels
        for bound, count in buckets:
            family.add_sample(f"{name}_bucket", labels | {"le": bound}, count)
        family.add_sample(f"{name}_count", labels, buckets[-1][1])
        family.add_sample(f"{name}_sum", labels, total)

    def state_set(self, name: str, text: str, label: str, known: Iterable[str], current: str, **labels: str) -> None:
        """A gauge per known state: 1 for the current one, 0 for the others."""
        for state in dict.fromkeys([*known, current]):
            self.gauge(name, text, float(state == current), **labels, **{label: state})

    def _family(self, name: str, text: str, kind: str) -> Metric:
        family = self._found.setdefault(name, Metric(name, text, kind))
        assert family.type == kind, f"{name} is a {family.type}, not a {kind}"
        return family
