"""Where the run is."""

import time
from dataclasses import dataclass, field
from typing import Any

from headrace.learner.checkpoints.record import Loss


@dataclass
class Progress:
    """`/status` shows it and a checkpoint keeps it."""

    step: int = 0
    phase: str = "starting"
    wall_s_before: float = 0.0
    """Of the run's earlier lives."""
    started: float = field(default_factory=time.monotonic)
    """When this life issued its first ticket."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest row of each kind."""
    losses: list[Loss] = field(default_factory=list)
    """Of Redis, over the run's lives."""

    @property
    def wall_s(self) -> float:
        return self.wall_s_before + time.monotonic() - self.started
