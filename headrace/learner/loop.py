"""The learner's loop, top to bottom: take a batch, take a step, publish, checkpoint, evaluate.

Guarantees: a group is trained once and counted in one state. Versions are announced in order, each after its files are
durable, while the next step runs. A stop leaves a checkpoint from which the next start resumes. Every wait has a
deadline and a typed reason, and a learner that waits keeps Redis small by a checkpoint. Changes of the desired state
are applied between steps and during waits.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from headrace.common.config import RunConfig
from headrace.common.process.waiting import Reason, Waits
from headrace.common.wire.desired_state import DesiredState, Settings
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.pending_groups import PendingGroup
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.stages.checkpointing import Checkpointer
from headrace.learner.stages.evaluation import Evaluator
from headrace.learner.stages.publishing import BackgroundPublisher
from headrace.learner.stages.wait_deadlines import WaitDeadlines
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.trainer import Trainer, no_probe
from headrace.learner.weights.publisher import WeightVersions

SWITCH_POLL_S = 0.2
WAIT_POLL_S = 1.0
"""The interval at which a wait for a batch is reported."""
_log = logging.getLogger(__name__)


@dataclass
class Loop:
    """The parts that a step needs, and the order in which it uses them."""

    live_config: LiveConfig
    checkpoints: Path
    store: LearnerStore
    trainer: Trainer
    intake: Intake
    versions: WeightVersions
    switches: Switches
    progress: Progress
    waits: Waits
    reporter: RunReporter
    evaluator: Evaluator
    _applied: DesiredState = field(default_factory=DesiredState)

    def __post_init__(self) -> None:
        """Checkpoints and evaluations that were requested before this start count as done."""
        self._applied = self.intake.control_state.desired_state
        self.wait_deadlines = WaitDeadlines(self.waits, self.intake, self.switches, self.live_config)
        parts = self.store, self.trainer, self.intake, self.versions, self.progress, self.reporter
        self.checkpointer = Checkpointer(self.checkpoints, *parts, self.wait_deadlines)
        is_on_hold = self._is_first_evaluation_open
        self.publisher = BackgroundPublisher(self.versions, self.wait_deadlines, self.switches, is_on_hold)

    @property
    def config(self) -> RunConfig:
        """The configuration that applies now."""
        return self.live_config.config

    def run(self) -> bool:
        """Runs until the last step, or until a stop is requested. True if the run is complete."""
        self.publish_first()
        if not self.intake.source.is_recording:
            self._wait_for_replica()
        self.progress.started = time.monotonic()
        self.intake.start()
        if self.progress.step == 0 and not self.intake.source.is_recording:
            self._wait_while_paused()
            self.evaluator.begin()
        while not self.is_at_last_step and not self.switches.stop.is_set():
            if self.switches.paused.is_set():
                self._wait_while_paused()
            elif self.intake.is_recording_exhausted:
                break
            else:
                self._take_step()
        self.intake.is_admitting = False
        self._wait_for_first_evaluation()
        if not self.switches.stop.is_set():
            self.publisher.wait()
        is_complete = not self.switches.stop.is_set() and self._evaluate_and_wait()
        self.checkpointer.write_last()
        self.acknowledge_stop()
        self.reporter.enter_phase("finished" if is_complete else "stopped")
        return is_complete

    def publish_first(self) -> None:
        """Publishes the weights that this learner starts with; returns when replicas can find them."""
        self.intake.advance(self.progress.step)
        self._publish()
        self.publisher.wait()

    def acknowledge_stop(self) -> None:
        """Stops the intake and clears a requested stop, so that the next start of the run does not stop for it."""
        self.intake.stop()
        self.switches.clear_stop()
        self.intake.control_state.sync_desired_state()

    def _wait_for_replica(self) -> None:
        """Returns when a replica runs, so that the first ticket is not issued before one can answer it."""
        self.reporter.enter_phase("waiting for a replica")
        while not any(replica.state == "running" for replica in self.intake.control_state.replicas):
            self.wait_deadlines.note_group_wait(Reason.NO_REPLICA)
            if self.switches.stop.wait(SWITCH_POLL_S):
                break
            self.intake.poll_control_state()
            self.reporter.refresh_paused_phase()
        self.wait_deadlines.end_group_wait(Reason.NO_REPLICA)

    @property
    def is_at_last_step(self) -> bool:
        return self.progress.step >= self.config.learner.steps

    def _is_first_evaluation_open(self) -> bool:
        """During the first evaluation the first step is taken. Its version, and the second step, wait for the end, so
        that all completions are sampled by the initial weights."""
        return self.intake.evaluation.is_first_open

    @property
    def _waiting_phase(self) -> str:
        """The adviser must not count a wait for replicas that evaluate."""
        return "evaluating" if self._is_first_evaluation_open() else "waiting"

    def _take_step(self) -> None:
        started = time.monotonic()
        if self.progress.step > 0:
            self._wait_for_first_evaluation()
        self.reporter.enter_phase(self._waiting_phase)
        batch = self._wait_for_batch()
        if batch is None:
            return
        waited = time.monotonic()
        self.reporter.enter_phase("training")
        probe = no_probe if self.intake.source.is_recording else self.intake.newest_if_fresh
        groups = [pending.group for pending in batch]
        row = self.trainer.train(groups, self.progress.step, self.intake.version_steps, probe)
        trained = time.monotonic()
        self.progress.step += 1
        self.intake.advance(self.progress.step)
        self.intake.mark_trained(batch)
        self._publish(len(batch))
        published = time.monotonic()
        self.reporter.write_group_samples()
        timings = {"wait_s": waited - started, "publish_s": published - trained, "step_s": published - started}
        timings["sample_write_s"] = time.monotonic() - published
        self.reporter.report_step(row | timings, batch)
        self._update_guard(row)
        self.checkpointer.is_due |= self.progress.step % self.config.learner.checkpoint_interval_steps == 0
        self.checkpointer.begin_if_due(self.checkpointer.would_help())
        self._apply_desired_state()
        interval = self.config.evaluation.interval_steps
        if interval and self.progress.step % interval == 0 and not self.intake.evaluation.is_running:
            self.evaluator.is_due = True
        self._evaluate_if_due()

    def _wait_for_batch(self) -> list[PendingGroup] | None:
        """None when interrupted, or when a recording is exhausted. A long wait is used for a checkpoint."""
        has_time, idle_s = True, self.checkpointer.idle_s
        while not self._is_interrupted() and not self.intake.is_recording_exhausted:
            batch = self.intake.take_batch(WAIT_POLL_S, self._is_interrupted)
            if batch is not None:
                self.wait_deadlines.end_group_wait(Reason.WAITING_FOR_GROUPS)
                return batch
            lasted_s = self.wait_deadlines.note_group_wait(Reason.WAITING_FOR_GROUPS)
            self.reporter.enter_phase(self._waiting_phase)
            self.reporter.write_group_samples()
            self._apply_desired_state()
            self._evaluate_if_due()
            would_help = self.checkpointer.would_help(has_time)
            if lasted_s > idle_s and (would_help or self.checkpointer.is_due):
                self.checkpointer.begin_if_due(would_help)
                has_time, idle_s = False, lasted_s + self.checkpointer.idle_s
        self.wait_deadlines.end_group_wait(Reason.WAITING_FOR_GROUPS)
        return None

    def _publish(self, num_groups: int = 0) -> None:
        """Returns when the weights are copied; `num_groups` were trained since the version before."""

        def on_announced(version: int) -> None:
            self.intake.on_announced(version, num_groups)
            self._begin_evaluation_if_due()

        self.publisher.begin(self.trainer.policy.published_weights(), self.progress.step, on_announced)

    def _apply_desired_state(self) -> None:
        """Applies what the desired state asks for, except pause and stop."""
        desired, applied = self.intake.control_state.desired_state, self._applied
        self._applied = desired
        if desired.settings != applied.settings:
            self._change_settings(desired.settings)
        self.checkpointer.is_requested |= desired.checkpoints > applied.checkpoints
        self.checkpointer.begin_if_requested()
        self.evaluator.is_due |= desired.evaluations > applied.evaluations
        self.reporter.refresh_paused_phase()

    def _change_settings(self, settings: Settings) -> None:
        """For the next step and for tickets issued from now on. Impossible settings are refused with an event."""
        change = {"version": settings.version, "step": self.progress.step, "values": settings.values}
        try:
            self.live_config.apply_settings(settings)
        except ValueError as error:
            _log.error("settings of version %d are refused: %s", settings.version, error)
            self.store.run_log.add_event("settings_refused", change | {"reason": str(error)})
            return
        self._configure()
        _log.info("settings of version %d apply after step %d: %s", *change.values())
        self.store.run_log.add_event("settings_applied", change)
        self.reporter.enter_phase(self.progress.phase)

    def _configure(self) -> None:
        self.trainer.config = self.config
        self.intake.configure(self.config)

    def _update_guard(self, row: dict[str, float]) -> None:
        state, kind, reason = self.live_config.update_guard(row)
        if kind in ("tighten", "loosen"):
            self._configure()
        if kind is not None:
            self.reporter.report_guard(kind, reason, state.level)

    def _evaluate_if_due(self) -> None:
        self._raise_background_failure()
        self.evaluator.collect()
        self._begin_evaluation_if_due()

    def _raise_background_failure(self) -> None:
        """Raises the failure of a publication or a checkpoint."""
        self.publisher.raise_failure()
        self.checkpointer.raise_failure()

    def _begin_evaluation_if_due(self) -> None:
        is_ending = self.is_at_last_step or self.switches.stop.is_set()
        if not is_ending and not self.intake.source.is_recording:
            self.evaluator.begin_if_due()

    def _evaluate_and_wait(self) -> bool:
        """Evaluates the last step. Nothing is published meanwhile, so every completion is of that step's version. False
        when stopped."""
        if self.intake.source.is_recording:
            return True
        self._wait_while_paused()
        self.reporter.enter_phase("evaluating")
        if self.intake.evaluation.is_running:
            self.evaluator.on_result(self._wait_for_evaluation())
        if not self.switches.stop.is_set():
            self.evaluator.begin()
            self.evaluator.on_result(self._wait_for_evaluation())
        return not self.intake.evaluation.is_running and not self.switches.stop.is_set()

    def _wait_for_first_evaluation(self) -> None:
        if self._is_first_evaluation_open():
            self.reporter.enter_phase("evaluating")
            self.evaluator.on_result(self._wait_for_evaluation())

    def _wait_for_evaluation(self) -> dict[str, float] | None:
        """None when stopped."""
        while (result := self.intake.evaluation.take_result(WAIT_POLL_S, self.switches.stop.is_set)) is None:
            if self.switches.stop.is_set():
                break
            self.wait_deadlines.note_group_wait(Reason.WAITING_FOR_EVALUATION)
            self.reporter.write_group_samples()
            self._apply_desired_state()
        self.wait_deadlines.end_group_wait(Reason.WAITING_FOR_EVALUATION)
        return result

    def _wait_while_paused(self) -> None:
        """While paused no step is taken and no ticket issued; an evaluation that has begun is finished."""
        if not self.switches.paused.is_set():
            return
        self.reporter.enter_phase("paused")
        while self.switches.paused.is_set() and not self.switches.stop.wait(SWITCH_POLL_S):
            self.waits.note(Reason.PAUSED)
            self.reporter.write_group_samples()
            self._apply_desired_state()
            self._raise_background_failure()
            self.evaluator.collect()
        self.waits.end(Reason.PAUSED)

    def _is_interrupted(self) -> bool:
        return self.switches.stop.is_set() or self.switches.paused.is_set()

    def close(self) -> None:
        self.intake.stop()
        self.publisher.close()
        self.checkpointer.close()
        self.versions.close()
        self.evaluator.best.close()
        self.reporter.close()
