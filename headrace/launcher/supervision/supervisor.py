"""Keeps the services of a run going until its learner has ended, then ends them in order.

What ends unasked is started again (restarts.py), and there are as many replicas as are ordered (replicas.py). When a
restart does not help, or the learner says that it would not, everything else is stopped and `Failed` raised. No wait
of this loop blocks it, so that a Ctrl-C is always heard.
"""

import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from headrace.launcher.supervision.liveness_probe import Health
from headrace.launcher.supervision.replicas import Replicas
from headrace.launcher.supervision.restarts import Failed, Kept
from headrace.launcher.terminal.progress_view import Watcher

LOOK_INTERVAL_S = 0.25
STOP_POLL_S = 0.05
HANG_TIMEOUT_S = 60.0
"""A learner that has not answered for so long is killed."""


class Supervisor:
    """The services of one run, of which `control` is the only one that it can do without.

    `signals` fills from outside: the first is a request to stop, the second to kill.
    """

    def __init__(
        self,
        learner: Kept,
        replicas: Replicas,
        control: Kept,
        redis: Kept | None,
        watcher: Watcher,
        signals: Sequence[int],
    ) -> None:
        self.learner = learner
        self.replicas = replicas
        self.control = control
        self.redis = redis
        """None: it is somebody else's."""
        self.watcher = watcher
        self.signals = signals
        self._is_control_given_up = False

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
            self._keep(self.redis)
            self._keep_control()
            for line in self.replicas.follow():
                self.watcher.say(line)
            self.watcher.is_scaled_to_0 = self.replicas.is_none_wanted
            self._keep_learner(health)
            self.watcher.look()
            time.sleep(LOOK_INTERVAL_S)

    def _keep(self, kept: Kept | None) -> None:
        if kept is not None and (line := kept.keep()):
            self.watcher.say(line)

    def _keep_control(self) -> None:
        """The run goes on without it, if it must."""
        if not self._is_control_given_up:
            try:
                self._keep(self.control)
            except Failed as failure:
                self._is_control_given_up = True
                self.watcher.say(f"control is given up, the run goes on without a page: {failure}")

    def _keep_learner(self, health: Health) -> None:
        service, url = self.learner.service, self.watcher.learner_url
        if service.returncode is None:
            if health.silent_s(url, service.process.pid) > HANG_TIMEOUT_S:
                self.watcher.say(f"the learner has not answered at {url} for {HANG_TIMEOUT_S:.0f} s: killing it")
                service.kill()
        elif service.returncode != 0:
            self._keep(self.learner)

    def _stop(self) -> None:
        """The learner and the replicas at the same time; control, which shows it, and Redis, which they need, after.

        First a last look at what those that have ended by themselves have left."""
        self.watcher.look()
        if self.signals and self.learner.is_running:
            self.watcher.say("stopping: the learner finishes its step and writes a checkpoint; once more kills it")
        self.replicas.orders.leave()
        self._end([self.learner, *self.replicas.all], is_redis_needed=True)
        self._end([self.control])
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
