"""The result of one part of the comparison."""

import statistics
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Headrace divided by its peer; one value per repeat, each measured side by side."""

    name: str
    values: list[float]
    goal: float
    is_ceiling: bool = False
    """Whether the goal is an upper bound instead of a lower one."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool:
        return self.median <= self.goal if self.is_ceiling else self.median >= self.goal


class Part(NamedTuple):
    rows: list[dict[str, Any]]
    """Measurements, one row per run."""
    ratios: list[Ratio]
