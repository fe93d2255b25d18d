"""Checkpoints beside the loop: it is held up for one copy of the state in host memory, and no more.

A thread of its own writes the copy, with the record of the same moment, by the rules of checkpoint.py; when it is
durable, what the checkpoint before recorded leaves Redis. One at a time. If the disk refuses, the ones before stand,
and another one is due.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from headrace.common.process.waiting import Reason
from headrace.learner.checkpoints.checkpoint import CheckpointError, save_checkpoint
from headrace.learner.checkpoints.record import Record
from headrace.learner.intake.intake import Consumed, Intake
from headrace.learner.reporting.reporter import Telling
from headrace.learner.stages.background import Beside
from headrace.learner.stages.wait_deadlines import Patience
from headrace.learner.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Checkpointer:
    def __init__(
        self,
        root: Path,
        trainer: Trainer,
        intake: Intake,
        telling: Telling,
        patience: Patience,
        check_fence: Callable[[], None],
    ) -> None:
        self.is_due = False
        """One was refused by the disk, or was to be written while another one was."""
        self.last_s = 0.0
        """How long the last one took to write."""
        self._root = root
        self._trainer = trainer
        self._intake = intake
        self._telling = telling
        self._patience = patience
        self._check_fence = check_fence
        self._beside = Beside("checkpoint", patience, Reason.CHECKPOINTING)
        self.wait, self.check, self.close = self._beside.wait, self._beside.check, self._beside.close

    @property
    def is_busy(self) -> bool:
        return self._beside.is_busy

    def begin(self, record: Record, consumed: Consumed) -> None:
        """Returns when the trainer's state is copied, which must be that of `record`."""
        self.is_due = False
        self._trainer.copy_state()
        self._beside.begin(partial(self._write, record, consumed))

    def _write(self, record: Record, consumed: Consumed) -> None:
        started = time.monotonic()
        try:
            saved = save_checkpoint(self._root, record, self._trainer.write_copy, self._check_fence)
        except CheckpointError as error:
            self.is_due = True
            self._patience.wait(Reason.CHECKPOINT, str(error))
            return
        self.last_s = time.monotonic() - started
        _log.info("checkpoint: records %d groups", len(consumed.settlements))
        self._telling.checkpoint(saved, record.step, self.last_s)
        self._patience.waits.over(Reason.CHECKPOINT)
        self._intake.checkpointed(consumed)
