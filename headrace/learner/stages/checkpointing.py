"""Writes checkpoints beside the loop, which waits only until the state is copied into host memory.

A thread writes the copy, with the record of the same moment, by the rules of checkpoint.py. When it is durable, the
groups that the checkpoint before recorded leave Redis. Checkpoints are written one at a time. If the disk refuses one,
those before it stay valid and another one is due.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from headrace.common.process.waiting import Reason
from headrace.learner.checkpoints.checkpoint import CheckpointError, save_checkpoint
from headrace.learner.checkpoints.record import CheckpointRecord
from headrace.learner.intake.intake import CheckpointDelta, Intake
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.stages.background import BackgroundWorker
from headrace.learner.stages.wait_deadlines import WaitDeadlines
from headrace.learner.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Checkpointer:
    def __init__(
        self,
        root: Path,
        trainer: Trainer,
        intake: Intake,
        reporter: RunReporter,
        wait_deadlines: WaitDeadlines,
        check_fence: Callable[[], None],
    ) -> None:
        self.is_due = False
        """The disk refused one, or one came due while another was being written."""
        self.last_duration_s = 0.0
        """The time that writing the last one took."""
        self._root = root
        self._trainer = trainer
        self._intake = intake
        self._reporter = reporter
        self._wait_deadlines = wait_deadlines
        self._check_fence = check_fence
        self._worker = BackgroundWorker("checkpoint", wait_deadlines, Reason.WAITING_FOR_CHECKPOINT)
        self.wait, self.raise_failure, self.close = self._worker.wait, self._worker.raise_failure, self._worker.close

    @property
    def is_busy(self) -> bool:
        return self._worker.is_busy

    def begin(self, record: CheckpointRecord, delta: CheckpointDelta) -> None:
        """Returns when the trainer's state is copied; `record` must be of the same step."""
        self.is_due = False
        self._trainer.copy_state()
        self._worker.begin(partial(self._write, record, delta))

    def _write(self, record: CheckpointRecord, delta: CheckpointDelta) -> None:
        started = time.monotonic()
        try:
            saved = save_checkpoint(self._root, record, self._trainer.write_copy, self._check_fence)
        except CheckpointError as error:
            self.is_due = True
            self._wait_deadlines.note_wait(Reason.CHECKPOINT_FAILING, str(error))
            return
        self.last_duration_s = time.monotonic() - started
        _log.info("checkpoint: records %d groups", len(delta.settlements))
        self._reporter.report_checkpoint(saved, record.step, self.last_duration_s)
        self._wait_deadlines.waits.end(Reason.CHECKPOINT_FAILING)
        self._intake.on_checkpointed(delta)
