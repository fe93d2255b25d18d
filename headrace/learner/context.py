"""What a learner is assembled from: its configuration, the run's folder, and its connections."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from headrace.common.config import RunConfig
from headrace.common.process.waiting import Waits
from headrace.common.redis.keys import Keys
from headrace.common.tasks import Task
from headrace.learner.intake.recordings import Recording
from headrace.learner.steering.switches import Switches

if TYPE_CHECKING:  # it imports torch
    from headrace.learner.distributed.ranks import Ranks


@dataclass
class LearnerContext:
    config: RunConfig
    folder: Path
    """The run's folder."""
    token: str
    client: redis.Redis
    keys: Keys
    url: str
    """The learner's own URL, which replicas fetch weights from."""
    task: Task
    switches: Switches
    waits: Waits
    recording: Recording | None = None
    """Replayed in place of tickets."""
    ranks: "Ranks | None" = None
    is_new_epoch: bool = False
    """Data other than the run's may begin its next epoch."""
