"""When the learner evaluates, and what it does with a result.

An evaluation that is due begins as soon as its version is announced, in the publisher's thread, so that as many of its
tokens as possible are sampled by that version. The loop collects the result.
"""

import threading
from dataclasses import dataclass, field

from headrace.learner.checkpoints.best import BestPolicy
from headrace.learner.intake.intake import Intake
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.weights.publisher import WeightVersions


@dataclass
class Evaluator:
    """Runs one evaluation at a time."""

    intake: Intake
    versions: WeightVersions
    best: BestPolicy
    reporter: RunReporter
    is_due: bool = False
    """An evaluation was requested and has not begun."""
    _last_version: int = 0
    """The weight version of the latest evaluation, finished or not."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self) -> None:
        """Begins the evaluation of the last announced version. The caller ensures that none is in progress."""
        with self._lock:
            self.is_due = False
            self._last_version = self.versions.current
            step = self.versions.steps[self._last_version]
            self.best.write_candidate(step, self._last_version, self.versions.newest_model_writer())
            self.intake.evaluation.begin(step, self._last_version)

    def begin_if_due(self) -> None:
        """Begins the evaluation that is due, unless one is in progress or a version is being published. A version is
        evaluated once: a second time its tickets would exist already."""
        with self._lock:
            is_possible = not self.intake.evaluation.is_running and not self.versions.is_publishing
            if self.is_due and is_possible and self._last_version < self.versions.current:
                self.begin()

    def collect(self) -> None:
        """Reports the evaluation if it is complete."""
        with self._lock:
            self.on_result(self.intake.evaluation.take_result())

    def on_result(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self.reporter.write_row("evaluation", result | {"is_best": self.best.keep_if_best(result["held_out"])})
