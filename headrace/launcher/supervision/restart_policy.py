"""The restart policy: a service that ends unexpectedly is restarted after growing pauses, a limited number of times."""

import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from headrace.launcher.run.processes import Service

MAX_RESTARTS = 5
"""Largest number of restarts without progress in between."""
PAUSES_S = (0, 1, 2, 4)
"""Pauses before the first, second, … restart without progress; the last one also before all later ones."""


class ServiceFailed(RuntimeError):
    """A service failed for good; the text has the end of its log."""


@dataclass
class SupervisedProcess:
    """A service and its restart policy. Constructing it starts the service."""

    start: Callable[[], Service]
    grace_s: float
    """Time between the request to stop and the kill."""
    progress: Callable[[], float]
    min_progress: float = 0.0
    """When `progress` has grown by more than this since the last start, earlier restarts no longer count."""
    no_restart_codes: Collection[int] = ()
    """Exit codes after which a restart would end the same way."""
    exit_reason: Callable[[], str] = lambda: ""
    """The reason that the service reported for its exit; if empty, its log is searched."""
    end_signal: int = signal.SIGTERM
    """The request to stop at the end of a run."""
    drain_s: float = 0.0
    """How much longer it may take to stop while the run goes on."""
    service: Service = field(init=False)
    restarts_without_progress: int = 0
    _restart_at: float | None = None
    _progress_at_start: float = 0.0

    def __post_init__(self) -> None:
        self._start()

    @property
    def is_running(self) -> bool:
        return self.service.returncode is None

    def restart_if_ended(self) -> str | None:
        """Restarts a service that has ended once its pause is over. Returns a line when it has just ended.

        Raises `ServiceFailed` if another restart would not help.
        """
        if self.is_running:
            return None
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self._start()
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
        count = self.restarts_without_progress
        when = f" in {pause_s} s" if pause_s else ""
        counted = f" ({count} of {MAX_RESTARTS} without progress)" if count > 1 else ""
        return f"{self._exit_summary()}: starting it again{when}{counted}"

    def _failure(self) -> str:
        return f"{self._exit_summary()}; {self.service.log_tail()}"

    def _exit_summary(self) -> str:
        """How it ended and, if it was not killed, why."""
        reason = (self.exit_reason() or self.service.last_error()) if (self.service.returncode or 0) > 0 else ""
        return f"{self.service.exit_summary()}{reason and ': '}{reason}"

    def _start(self) -> None:
        self._restart_at = None
        self._progress_at_start = self.progress()
        self.service = self.start()
