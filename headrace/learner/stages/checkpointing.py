"""When the learner checkpoints, and how: the loop waits only until the state is copied into host memory.

A thread writes the copy, with the record of the same moment, by the rules of checkpoint.py. When it is durable, the
groups that the checkpoint before recorded leave Redis. Checkpoints are written one at a time. If the disk refuses one,
those before it stay valid and another one is due.
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headrace.common.process.waiting import Reason
from headrace.learner.checkpoints.checkpoint import CheckpointError, save_checkpoint
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.checkpoints.record import MAX_VERSION_STEPS, CheckpointRecord
from headrace.learner.intake.intake import CheckpointDelta, Intake
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.stages.background import BackgroundWorker
from headrace.learner.stages.wait_deadlines import WaitDeadlines
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.trainer import Trainer
from headrace.learner.weights.publisher import WeightVersions

RETRY_S = 1.0
IDLE_CHECKPOINT_S, IDLE_CHECKPOINT_SHARE = 10.0, 0.25
"""A wait for groups is used for a checkpoint, so that consumed groups can leave Redis, once it has lasted
`IDLE_CHECKPOINT_S` and so long that the last checkpoint took at most `IDLE_CHECKPOINT_SHARE` of it."""
MAX_UNSETTLED_BYTES = 256 << 20
"""A checkpoint is due when the consumed groups in Redis exceed this."""
_log = logging.getLogger(__name__)


@dataclass
class Checkpointer:
    root: Path
    store: LearnerStore
    trainer: Trainer
    intake: Intake
    versions: WeightVersions
    progress: Progress
    reporter: RunReporter
    wait_deadlines: WaitDeadlines
    is_due: bool = False
    """By the interval, because the disk refused one, or because one came due while another was being written."""
    is_requested: bool = False
    """A person asked for one; only one that begins afterwards answers that."""
    last_duration_s: float = 0.0
    """The time that writing the last one took."""

    def __post_init__(self) -> None:
        self._worker = BackgroundWorker("checkpoint", self.wait_deadlines, Reason.WAITING_FOR_CHECKPOINT)
        self.wait, self.raise_failure, self.close = self._worker.wait, self._worker.raise_failure, self._worker.close

    @property
    def is_busy(self) -> bool:
        return self._worker.is_busy

    @property
    def idle_s(self) -> float:
        """How long the learner must have waited for groups before it uses the wait for a checkpoint."""
        return max(IDLE_CHECKPOINT_S, self.last_duration_s / IDLE_CHECKPOINT_SHARE)

    def would_help(self, has_time: bool = False) -> bool:
        """Groups could leave Redis after a checkpoint, and Redis is full, has too many of them, or the learner
        `has_time`."""
        log = self.intake.settlement_log
        if self.wait_deadlines.waits.is_waiting(Reason.REDIS_REFUSING):
            return bool(log.unsettled_bytes or log.checkpointed)
        return log.unsettled_bytes > (0 if has_time else MAX_UNSETTLED_BYTES)

    def begin_if_due(self, would_help: bool = False) -> None:
        """Begins a checkpoint that is due or `would_help`. One that is due waits until none is being written."""
        if not self.is_busy and (self.is_due or would_help):
            self.begin()

    def begin_if_requested(self) -> None:
        if self.is_requested and not self.is_busy:
            self.is_requested = False
            self.begin()

    def begin(self) -> None:
        """Returns when the trainer's state is copied."""
        delta = self.intake.checkpoint_delta()
        record = self._record(delta)
        self.is_due = False
        self.trainer.copy_state()
        self._worker.begin(partial(self._write, record, delta))

    def write_last(self) -> None:
        """Writes the learner's last checkpoint: retries until the deadline, but once when it is stopping. Raises
        `CheckpointError` if it was stopped without one."""
        stop = self.wait_deadlines.switches.stop
        self.wait()
        self.begin()
        self.wait()
        while self.is_due and not stop.wait(RETRY_S):
            self.begin()
            self.wait()
        if self.is_due:
            problem = self.wait_deadlines.waits.describe()
            raise CheckpointError(f"stopped without a checkpoint of step {self.progress.step}: {problem}")

    def _record(self, delta: CheckpointDelta) -> CheckpointRecord:
        steps = dict(self.versions.steps)  # a copy: the publisher's thread adds to it
        live_config = self.wait_deadlines.live_config
        return CheckpointRecord(
            epoch=self.store.epoch,
            step=self.progress.step,
            version=self.versions.current,
            cursor=delta.cursor,
            version_steps={version: steps[version] for version in sorted(steps)[-MAX_VERSION_STEPS:]},
            settlements=delta.settlements,
            earlier=delta.earlier,
            unfinished=delta.unfinished,
            counts=delta.counts,
            wall_s=self.progress.wall_s,
            losses=self.progress.losses,
            settings=live_config.settings,
            guard=live_config.guard,
            data=self.intake.source.data,
        )

    def _write(self, record: CheckpointRecord, delta: CheckpointDelta) -> None:
        started = time.monotonic()
        try:
            saved = save_checkpoint(self.root, record, self.trainer.write_copy, self.store.check_fence)
        except CheckpointError as error:
            self.is_due = True
            self.wait_deadlines.note_wait(Reason.CHECKPOINT_FAILING, str(error))
            return
        self.last_duration_s = time.monotonic() - started
        _log.info("checkpoint: records %d groups", len(delta.settlements))
        self.reporter.report_checkpoint(saved, record.step, self.last_duration_s)
        self.wait_deadlines.waits.end(Reason.CHECKPOINT_FAILING)
        self.intake.on_checkpointed(delta)
