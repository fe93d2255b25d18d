"""Keeps the services of a run going until its learner has ended, then ends them in order.

It restarts a service that ends unexpectedly (restart_policy.py) and keeps as many replicas as the target says
(replicas.py). When a restart does not help, or the learner's exit code says that it would not, it stops everything else
and raises `ServiceFailed`. No wait blocks the loop, so that it always reacts to Ctrl-C.
"""

import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from headrace.launcher.supervision.liveness_probe import LivenessProbe
from headrace.launcher.supervision.replicas import Replicas
from headrace.launcher.supervision.restart_policy import ServiceFailed, SupervisedProcess
from headrace.launcher.terminal.progress_view import ProgressView

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
        learner: SupervisedProcess,
        replicas: Replicas,
        control: SupervisedProcess,
        redis: SupervisedProcess | None,
        view: ProgressView,
        signals: Sequence[int],
    ) -> None:
        self.learner = learner
        self.replicas = replicas
        self.control = control
        self.redis = redis
        """None: it is somebody else's."""
        self.view = view
        self.signals = signals
        self._is_control_given_up = False

    def run(self) -> None:
        """Until the run is complete or stopped as asked, else raises `ServiceFailed`; nothing runs after it."""
        try:
            with LivenessProbe() as health:
                self._keep_going(health)
            was_running = self.learner.is_running
        finally:
            self._stop()
        if was_running and len(self.signals) > 1:
            raise ServiceFailed("killed as asked; the run goes on from its newest checkpoint")
        if was_running and self.learner.service.returncode not in (0, -signal.SIGTERM):
            raise ServiceFailed(
                f"{self.learner.service.exit_summary()} when asked to stop; {self.learner.service.log_tail()}"
            )

    def _keep_going(self, health: LivenessProbe) -> None:
        while not self.signals and self.learner.service.returncode != 0:
            self._keep(self.redis)
            self._keep_control()
            for line in self.replicas.follow():
                self.view.say(line)
            self.view.is_scaled_to_0 = self.replicas.is_none_wanted
            self._keep_learner(health)
            self.view.look()
            time.sleep(LOOK_INTERVAL_S)

    def _keep(self, kept: SupervisedProcess | None) -> None:
        if kept is not None and (line := kept.keep()):
            self.view.say(line)

    def _keep_control(self) -> None:
        """The run goes on without it, if it must."""
        if not self._is_control_given_up:
            try:
                self._keep(self.control)
            except ServiceFailed as failure:
                self._is_control_given_up = True
                self.view.say(f"control is given up, the run goes on without a page: {failure}")

    def _keep_learner(self, health: LivenessProbe) -> None:
        service, url = self.learner.service, self.view.learner_url
        if service.returncode is None:
            if health.silent_s(url, service.process.pid) > HANG_TIMEOUT_S:
                self.view.say(f"the learner has not answered at {url} for {HANG_TIMEOUT_S:.0f} s: killing it")
                service.kill()
        elif service.returncode != 0:
            self._keep(self.learner)

    def _stop(self) -> None:
        """The learner and the replicas at the same time; control, which shows it, and Redis, which they need, after.

        First a last look at what those that have ended by themselves have left."""
        self.view.look()
        if self.signals and self.learner.is_running:
            self.view.say("stopping: the learner finishes its step and writes a checkpoint; once more kills it")
        self.replicas.orders.leave()
        self._end([self.learner, *self.replicas.all], is_redis_needed=True)
        self._end([self.control])
        if self.redis is not None:
            self._end([self.redis])

    def _end(self, asked: Sequence[SupervisedProcess], is_redis_needed: bool = False) -> None:
        for kept in asked:
            kept.service.ask_to_stop()
        asked_at = time.monotonic()
        while running := [kept for kept in asked if kept.is_running]:
            for kept in running:
                if len(self.signals) > 1:
                    kept.service.kill()
                elif time.monotonic() - asked_at > kept.grace_s:
                    self.view.say(f"{kept.service.name} did not stop within {kept.grace_s:.0f} s: killing it")
                    kept.service.kill()
            if is_redis_needed:
                with suppress(ServiceFailed):
                    self._keep(self.redis)
                self.view.look()
            time.sleep(STOP_POLL_S)
