"""The run's progress: step, phase and duration."""

import time
from dataclasses import dataclass, field
from typing import Any

from headrace.learner.checkpoints.record import RedisLoss


@dataclass
class Progress:
    """`/status` shows it, and checkpoints store it."""

    step: int = 0
    phase: str = "starting"
    wall_s_before: float = 0.0
    """Duration of the run before this start of the learner."""
    started: float = field(default_factory=time.monotonic)
    """The monotonic time at which this start issued its first ticket."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest row of each kind."""
    losses: list[RedisLoss] = field(default_factory=list)
    """Losses of Redis's data, over all starts of the run."""

    @property
    def wall_s(self) -> float:
        return self.wall_s_before + time.monotonic() - self.started
