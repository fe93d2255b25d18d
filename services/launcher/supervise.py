"""Keeps the services of a run going until its learner has ended, then ends them in order.

What ends unasked is started again, after growing pauses, and at most MAX_RESTARTS times without progress between.
When that does not help, or the learner says that another start would not, everything else is stopped and `Failed`
raised. No wait of this loop blocks it, so that a Ctrl-C is always heard.
"""

import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from services.launcher.health import Health
from services.launcher.processes import Service
from services.launcher.watch import Watcher

LOOK_INTERVAL_S = 0.25
STOP_POLL_S = 0.05
MAX_RESTARTS = 5
PAUSES_S = (0, 1, 2, 4)
"""Before the first restart without progress, the second and so on; the last for all later ones."""
HANG_TIMEOUT_S = 60.0
"""A learner that has not answered for so long is killed."""


class Failed(RuntimeError):
    """A service failed; the text has the end of its log."""


@dataclass
class Kept:
    """A service that is started again when it ends unasked; started by its construction."""

    start: Callable[[], Service]
    grace_s: float
    """After it was asked to stop it is given so long."""
    progress: Callable[[], float]
    enough_progress: float = 0.0
    """Restarts before `progress` has grown by more than this since the last start no longer count."""
    final: Collection[int] = ()
    """Exit codes after which another start would come to the same end."""
    reason: Callable[[], str] = lambda: ""
    """What it said of its end, if it ended by itself."""
    service: Service = field(init=False)
    num_in_vain: int = 0
    _restart_at: float | None = None
    _progress_at_start: float = 0.0

    def __post_init__(self) -> None:
        self._begin()

    @property
    def is_running(self) -> bool:
        return self.service.returncode is None

    def keep(self) -> str | None:
        """Starts it again if it has ended and its pause is over; a line when it has ended, or `Failed`."""
        if self.is_running:
            return None
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                self._begin()
            return None
        if self.progress() - self._progress_at_start > self.enough_progress:
            self.num_in_vain = 0
        if self.service.returncode in self.final:
            raise Failed(self._failure())
        if self.num_in_vain == MAX_RESTARTS:
            raise Failed(f"{MAX_RESTARTS} restarts without progress: {self._failure()}")
        pause_s = PAUSES_S[min(self.num_in_vain, len(PAUSES_S) - 1)]
        self.num_in_vain += 1
        self._restart_at = time.monotonic() + pause_s
        when = f" in {pause_s} s" if pause_s else ""
        count = f" ({self.num_in_vain} of {MAX_RESTARTS} without progress)" if self.num_in_vain > 1 else ""
        return f"{self.service.ending()}: starting it again{when}{count}"

    def _failure(self) -> str:
        reason = self.reason() if (self.service.returncode or 0) > 0 else ""
        return f"{self.service.ending()}{reason and ': '}{reason}; {self.service.log_tail()}"

    def _begin(self) -> None:
        self._restart_at = None
        self._progress_at_start = self.progress()
        self.service = self.start()


class Supervisor:
    """The services of one run. `signals` fills from outside: the first is a request to stop, the second to kill."""

    def __init__(
        self, learner: Kept, replicas: Sequence[Kept], redis: Kept | None, watcher: Watcher, signals: Sequence[int]
    ) -> None:
        self.learner = learner
        self.replicas = replicas
        self.redis = redis
        """None: it is somebody else's."""
        self.watcher = watcher
        self.signals = signals

    def run(self) -> None:
        """Until the run is complete or stopped as asked, else raises `Failed`; nothing runs after it."""
        try:
            with Health() as health:
                self._keep_going(health)
            was_running = self.learner.is_running
        finally:
            self._stop()
        if was_running and len(self.signals) > 1:
            raise Failed("killed as asked; the run goes on from its newest checkpoint")
        if was_running and self.learner.service.returncode not in (0, -signal.SIGTERM):
            raise Failed(f"{self.learner.service.ending()} when asked to stop; {self.learner.service.log_tail()}")

    def _keep_going(self, health: Health) -> None:
        while not self.signals and self.learner.service.returncode != 0:
            self._keep(self.redis, *self.replicas)
            self._keep_learner(health)
            self.watcher.look()
            time.sleep(LOOK_INTERVAL_S)
        self.watcher.look()

    def _keep(self, *services: Kept | None) -> None:
        for kept in services:
            if kept is not None and (line := kept.keep()):
                self.watcher.say(line)

    def _keep_learner(self, health: Health) -> None:
        service, url = self.learner.service, self.watcher.learner_url
        if service.returncode is None:
            if health.silent_s(url, service.process.pid) > HANG_TIMEOUT_S:
                self.watcher.say(f"the learner has not answered at {url} for {HANG_TIMEOUT_S:.0f} s: killing it")
                service.kill()
        elif service.returncode != 0:
            self._keep(self.learner)

    def _stop(self) -> None:
        """The learner and the replicas at the same time; Redis, which they need to end well, after them."""
        if self.signals and self.learner.is_running:
            self.watcher.say("stopping: the learner finishes its step and writes a checkpoint; once more kills it")
        self._end([self.learner, *self.replicas], is_redis_needed=True)
        if self.redis is not None:
            self._end([self.redis])

    def _end(self, asked: Sequence[Kept], is_redis_needed: bool = False) -> None:
        for kept in asked:
            kept.service.ask_to_stop()
        asked_at = time.monotonic()
        while running := [kept for kept in asked if kept.is_running]:
            for kept in running:
                if len(self.signals) > 1:
                    kept.service.kill()
                elif time.monotonic() - asked_at > kept.grace_s:
                    self.watcher.say(f"{kept.service.name} did not stop within {kept.grace_s:.0f} s: killing it")
                    kept.service.kill()
            if is_redis_needed:
                with suppress(Failed):
                    self._keep(self.redis)
                self.watcher.look()
            time.sleep(STOP_POLL_S)
