"""When the learner evaluates, and what becomes of a result.

An evaluation that is due begins as soon as its version is announced, in the publisher's thread, so that as many of its
tokens as possible are of that version; the loop collects it.
"""

import threading
from dataclasses import dataclass, field

from headrace.learner.checkpoints.best import Best
from headrace.learner.intake.intake import Intake
from headrace.learner.reporting.reporter import Telling
from headrace.learner.weights.publisher import Versions


@dataclass
class Evaluations:
    """One at a time."""

    intake: Intake
    versions: Versions
    best: Best
    telling: Telling
    is_due: bool = False
    """Asked for and not yet begun."""
    _evaluated: int = 0
    """The latest version of which there was or is one."""

    _deciding: threading.RLock = field(default_factory=threading.RLock)

    def begin(self) -> None:
        """Of the version that was announced last, none being on its way."""
        with self._deciding:
            self.is_due = False
            self._evaluated = self.versions.current
            step = self.versions.steps[self._evaluated]
            self.best.set_aside(step, self._evaluated, self.versions.copy_of_newest())
            self.intake.begin_evaluation(step, self._evaluated)

    def begin_if_due(self) -> None:
        """No version is evaluated twice: its tickets exist. While one is on its way it is waited for."""
        with self._deciding:
            is_possible = not self.intake.is_evaluating and not self.versions.is_publishing
            if self.is_due and is_possible and self._evaluated < self.versions.current:
                self.begin()

    def collect(self) -> None:
        """What is done."""
        with self._deciding:
            self.record(self.intake.finished_evaluation())

    def record(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self.telling.row("evaluation", result | {"is_best": self.best.decide(result["held_out"])})
