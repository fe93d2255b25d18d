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

POLL_INTERVAL_S = 0.25
STOP_POLL_S = 0.05
HANG_TIMEOUT_S = 60.0
"""A learner that has not answered for this long is killed."""


class Supervisor:
    """Supervises the services of one run; the run continues without `control`, but not without any other service.

    `signals` is filled from outside: the first signal is a request to stop, the second one to kill.
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
        """None: the launcher did not start the Redis."""
        self.view = view
        self.signals = signals
        self._is_control_given_up = False

    def run(self) -> None:
        """Returns when the run is complete or stopped on request, else raises `ServiceFailed`. All services end."""
        try:
            with LivenessProbe() as probe:
                self._supervise(probe)
            was_running = self.learner.is_running
        finally:
            self._stop()
        service = self.learner.service
        if was_running and len(self.signals) > 1:
            raise ServiceFailed("killed on request; the run continues from its newest checkpoint")
        if was_running and service.returncode not in (0, -signal.SIGTERM):
            raise ServiceFailed(f"{service.exit_summary()} when asked to stop; {service.log_tail()}")

    def _supervise(self, probe: LivenessProbe) -> None:
        while not self.signals and self.learner.service.returncode != 0:
            self._restart_if_ended(self.redis)
            self._supervise_control()
            for line in self.replicas.reconcile():
                self.view.say(line)
            self.view.is_scaled_to_0 = self.replicas.is_target_zero
            self._supervise_learner(probe)
            self.view.refresh()
            time.sleep(POLL_INTERVAL_S)

    def _restart_if_ended(self, process: SupervisedProcess | None) -> None:
        if process is not None and (line := process.restart_if_ended()):
            self.view.say(line)

    def _supervise_control(self) -> None:
        if not self._is_control_given_up:
            try:
                self._restart_if_ended(self.control)
            except ServiceFailed as failure:
                self._is_control_given_up = True
                self.view.say(f"control is given up, the run goes on without a page: {failure}")

    def _supervise_learner(self, probe: LivenessProbe) -> None:
        service, url = self.learner.service, self.view.learner_url
        if service.returncode is None:
            if probe.silent_s(url, service.process.pid) > HANG_TIMEOUT_S:
                self.view.say(f"the learner has not answered at {url} for {HANG_TIMEOUT_S:.0f} s: killing it")
                service.kill()
        elif service.returncode != 0:
            self._restart_if_ended(self.learner)

    def _stop(self) -> None:
        """Ends learner and replicas at the same time; then control, which shows it; then Redis, which they need.

        Before that, it shows the last events that the services left in Redis."""
        self.view.refresh()
        if self.signals and self.learner.is_running:
            self.view.say("stopping: the learner finishes its step and writes a checkpoint; Ctrl-C again kills it")
        self.replicas.target.close()
        self._end([self.learner, *self.replicas.all], is_redis_needed=True)
        self._end([self.control])
        if self.redis is not None:
            self._end([self.redis])

    def _end(self, processes: Sequence[SupervisedProcess], is_redis_needed: bool = False) -> None:
        for process in processes:
            process.service.ask_to_stop(process.end_signal)
        asked_at = time.monotonic()
        while running := [process for process in processes if process.is_running]:
            for process in running:
                if len(self.signals) > 1:
                    process.service.kill()
                elif time.monotonic() - asked_at > process.grace_s:
                    name = process.service.name
                    self.view.say(f"{name} did not stop within {process.grace_s:.0f} s: killing it")
                    process.service.kill()
            if is_redis_needed:
                with suppress(ServiceFailed):
                    self._restart_if_ended(self.redis)
                self.view.refresh()
            time.sleep(STOP_POLL_S)
