"""What a part of the comparison found."""

import statistics
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Headrace over what it is compared with; one value a repeat, each measured side by side."""

    name: str
    values: list[float]
    goal: float
    is_ceiling: bool = False
    """The goal is not to be exceeded; else it is to be reached."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool:
        return self.median <= self.goal if self.is_ceiling else self.median >= self.goal


class Part(NamedTuple):
    rows: list[dict[str, Any]]
    """What was measured, a row a run."""
    ratios: list[Ratio]
