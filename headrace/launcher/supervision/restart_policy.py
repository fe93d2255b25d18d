"""A service that is started again when it ends unasked: after growing pauses, and not for ever."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from headrace.launcher.run.processes import Service

MAX_RESTARTS = 5
"""Without progress between."""
PAUSES_S = (0, 1, 2, 4)
"""Before the first restart without progress, the second and so on; the last for all later ones."""


class ServiceFailed(RuntimeError):
    """A service failed; the text has the end of its log."""


@dataclass
class SupervisedProcess:
    """A service that is started again when it ends unasked; started by its construction."""

    start: Callable[[], Service]
    grace_s: float
    """After it was asked to stop it is given so long."""
    progress: Callable[[], float]
    min_progress: float = 0.0
    """Restarts before `progress` has grown by more than this since the last start no longer count."""
    no_restart_codes: Collection[int] = ()
    """Exit codes after which another start would come to the same end."""
    reason: Callable[[], str] = lambda: ""
    """What it said of its end, if it ended by itself; else its log tells."""
    service: Service = field(init=False)
    restarts_without_progress: int = 0
    _restart_at: float | None = None
    _progress_at_start: float = 0.0

    def __post_init__(self) -> None:
        self._begin()

    @property
    def is_running(self) -> bool:
        return self.service.returncode is None

    def keep(self) -> str | None:
        """Starts it again if it has ended and its pause is over; a line when it has ended, or `ServiceFailed`."""
        if self.is_running:
            return None
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self._begin()
            return None
        if self.progress() - self._progress_at_start > self.min_progress:
            self.restarts_without_progress = 0
        if self.service.returncode in self.no_restart_codes:
            raise ServiceFailed(self._failure())
        if self.restarts_without_progress == MAX_RESTARTS:
            raise ServiceFailed(f"{MAX_RESTARTS} restarts without progress: {self._failure()}")
        pause_s = PAUSES_S[min(self.restarts_without_progress, len(PAUSES_S) - 1)]
        self.restarts_without_progress += 1
        self._restart_at = time.monotonic() + pause_s
        when = f" in {pause_s} s" if pause_s else ""
        count = (
            f" ({self.restarts_without_progress} of {MAX_RESTARTS} without progress)"
            if self.restarts_without_progress > 1
            else ""
        )
        return f"{self._ending()}: starting it again{when}{count}"

    def _failure(self) -> str:
        return f"{self._ending()}; {self.service.log_tail()}"

    def _ending(self) -> str:
        """How it ended and, if it ended by itself, why."""
        reason = (self.reason() or self.service.last_error()) if (self.service.returncode or 0) > 0 else ""
        return f"{self.service.exit_summary()}{reason and ': '}{reason}"

    def _begin(self) -> None:
        self._restart_at = None
        self._progress_at_start = self.progress()
        self.service = self.start()
