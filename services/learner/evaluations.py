"""When the learner evaluates, and what becomes of a result."""

from dataclasses import dataclass

from services.learner.best import Best
from services.learner.intake import Intake
from services.learner.progress import Progress
from services.learner.telling import Telling
from services.learner.versions import Versions


@dataclass
class Evaluations:
    """One at a time, of the version that was published last."""

    intake: Intake
    versions: Versions
    progress: Progress
    best: Best
    telling: Telling
    is_due: bool = False
    """Asked for and not yet begun."""
    _evaluated: int = 0
    """The latest version of which there was or is one."""

    def begin(self) -> None:
        self.is_due = False
        self._evaluated = self.versions.current
        self.best.set_aside(self.progress.step, self._evaluated, self.versions.copy_of_newest())
        self.intake.begin_evaluation(self.progress.step, self._evaluated)

    def begin_if_due(self) -> None:
        """No version is evaluated twice: its tickets exist."""
        if self.is_due and not self.intake.is_evaluating and self._evaluated < self.versions.current:
            self.begin()

    def collect(self) -> None:
        """What is done."""
        self.record(self.intake.finished_evaluation())

    def record(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self.telling.row("evaluation", result | {"is_best": self.best.decide(result["held_out"])})
