"""The verdict: the worst check as one sentence, and since when the run has been in that state."""

from collections.abc import Sequence

from headrace.control.models.status import Level, Verdict
from headrace.control.verdict.check_inputs import CheckInputs, CheckResult
from headrace.control.verdict.learning_checks import learning_checks
from headrace.control.verdict.run_checks import run_checks

WORST_FIRST: tuple[Level, ...] = ("critical", "warning", "waiting", "ended", "healthy")


def all_checks(inputs: CheckInputs) -> list[CheckResult]:
    """The result of every check, the worst first."""
    results = [*run_checks(inputs), *learning_checks(inputs)]
    return sorted(results, key=lambda one: WORST_FIRST.index(one.check.level))


class VerdictTracker:
    """Makes the verdict, and remembers since when it has been the same."""

    def __init__(self) -> None:
        self._known: tuple[str, Level] | None = None
        self._since_at = 0.0

    def verdict(self, results: Sequence[CheckResult], now: float) -> Verdict:
        """`results`: those of `all_checks`."""
        worst, advice = results[0]
        is_well = worst.level == "healthy"
        known = ("" if is_well else worst.name, worst.level)
        if known != self._known:
            self._known, self._since_at = known, now
        others = 0 if is_well else sum(one.check.level == worst.level for one in results) - 1
        more = f" (and {others} more)" if others and worst.level in ("critical", "warning") else ""
        text = "healthy" if is_well else worst.text + more
        return Verdict(level=worst.level, text=text, advice=advice, since_at=self._since_at)
