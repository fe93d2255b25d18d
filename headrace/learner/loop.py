"""The learner's loop, top to bottom: take a batch, take a step, publish, checkpoint, evaluate.

Guarantees: a group is trained once and counted in one state; versions are announced in their order, each only after
its files are durable, while the next step runs; a stop leaves a checkpoint from which the next start goes on; every
wait has a deadline and a typed reason, and while nothing can be done the learner keeps Redis small by a checkpoint.
What is ordered is obeyed between steps and while the learner waits.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from headrace.common.config import RunConfig
from headrace.common.process.waiting import Reason, Waits
from headrace.common.wire.desired_state import DesiredState, Settings
from headrace.learner.checkpoints.checkpoint import CheckpointError
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.checkpoints.record import MAX_VERSION_STEPS, CheckpointRecord
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
"""Between two looks at why no batch is there."""
IDLE_CHECKPOINT_S, IDLE_CHECKPOINT_SHARE = 10.0, 0.25
"""A learner that has waited this long, and so long that the last checkpoint took at most such a share of it, uses the
time for one, so that consumed groups can leave Redis."""
MAX_HELD_BYTES = 256 << 20
"""Of consumed groups in Redis; more, and a checkpoint is due."""
_log = logging.getLogger(__name__)


@dataclass
class Loop:
    """Everything that a step touches."""

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
    _is_checkpoint_requested: bool = False
    _applied: DesiredState = field(default_factory=DesiredState)

    def __post_init__(self) -> None:
        """What was asked for once before this start counts as applied."""
        self._applied = self.intake.control_state.desired_state
        self.wait_deadlines = WaitDeadlines(self.waits, self.intake, self.switches, self.live_config)
        parts = self.trainer, self.intake, self.reporter, self.wait_deadlines, self.store.check_fence
        self.checkpointer = Checkpointer(self.checkpoints, *parts)
        is_on_hold = self._is_first_evaluation_open
        self.publisher = BackgroundPublisher(self.versions, self.wait_deadlines, self.switches, is_on_hold)

    @property
    def config(self) -> RunConfig:
        """As it counts now."""
        return self.live_config.config

    def run(self) -> bool:
        """Until the last step, or until told to stop; True if the run is complete."""
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
        self._checkpoint_at_last()
        self.has_ended()
        self.reporter.enter_phase("finished" if is_complete else "stopped")
        return is_complete

    def publish_first(self) -> None:
        """The weights that this life begins with; returns when replicas can find them."""
        self.intake.advance(self.progress.step)
        self._publish()
        self.publisher.wait()

    def has_ended(self) -> None:
        """An order to stop has been obeyed, or is met by a run that is complete."""
        self.intake.stop()
        self.switches.clear_stop()
        self.intake.control_state.sync_desired_state()

    def _wait_for_replica(self) -> None:
        """Nobody could answer the first ticket before one serves."""
        self.reporter.enter_phase("waiting for a replica")
        while not any(replica.state == "running" for replica in self.intake.control_state.replicas):
            self.wait_deadlines.note_group_wait(Reason.NO_REPLICA)
            if self.switches.stop.wait(SWITCH_POLL_S):
                break
            self.intake.poll_control_state()
            self.reporter.refresh_paused_phase()
        self.wait_deadlines.end_group_wait(Reason.NO_REPLICA)

    @property
    def _idle_s(self) -> float:
        """How long a wait must last for a checkpoint."""
        return max(IDLE_CHECKPOINT_S, self.checkpointer.last_duration_s / IDLE_CHECKPOINT_SHARE)

    @property
    def is_at_last_step(self) -> bool:
        return self.progress.step >= self.config.learner.steps

    def _is_first_evaluation_open(self) -> bool:
        """Beside it the first step is taken; its version, and the second step, wait, so that all completions are of the
        weights that the run begins with."""
        return self.intake.evaluation.is_first_open

    @property
    def _waiting(self) -> str:
        """The phase: replicas that evaluate say nothing of how many are right."""
        return "evaluating" if self._is_first_evaluation_open() else "waiting"

    def _take_step(self) -> None:
        started = time.monotonic()
        if self.progress.step > 0:
            self._wait_for_first_evaluation()
        self.reporter.enter_phase(self._waiting)
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
        is_due = self.progress.step % self.config.learner.checkpoint_interval_steps == 0
        self._checkpoint_if_due(is_due, self._would_checkpoint_help())
        self._apply_desired_state()
        interval = self.config.evaluation.interval_steps
        if interval and self.progress.step % interval == 0 and not self.intake.evaluation.is_running:
            self.evaluator.is_due = True
        self._evaluate_if_due()

    def _wait_for_batch(self) -> list[PendingGroup] | None:
        """None when interrupted, or when a recording has ended. A long wait is used for one checkpoint."""
        has_time, idle_s = True, self._idle_s
        while not self._is_interrupted() and not self.intake.is_recording_exhausted:
            batch = self.intake.take_batch(WAIT_POLL_S, self._is_interrupted)
            if batch is not None:
                self.wait_deadlines.end_group_wait(Reason.WAITING_FOR_GROUPS)
                return batch
            lasted_s = self.wait_deadlines.note_group_wait(Reason.WAITING_FOR_GROUPS)
            self.reporter.enter_phase(self._waiting)
            self.reporter.write_group_samples()
            self._apply_desired_state()
            self._evaluate_if_due()
            would_help = self._would_checkpoint_help(has_time)
            if lasted_s > idle_s and (would_help or self.checkpointer.is_due):
                self._checkpoint_if_due(False, would_help)
                has_time, idle_s = False, lasted_s + self._idle_s
        self.wait_deadlines.end_group_wait(Reason.WAITING_FOR_GROUPS)
        return None

    def _publish(self, num_groups: int = 0) -> None:
        """Returns when the weights are copied, which the last `num_groups` trained."""

        def announced(version: int) -> None:
            self.intake.on_announced(version, num_groups)
            self._begin_evaluation_if_due()

        self.publisher.begin(self.trainer.policy.tensors(), self.progress.step, announced)

    def _checkpoint(self) -> None:
        """Begins one: returns when the state is copied."""
        delta = self.intake.checkpoint_delta()
        steps = dict(self.versions.steps)  # to which the publisher adds
        record = CheckpointRecord(
            epoch=self.store.epoch,
            step=self.progress.step,
            version=self.versions.current,
            cursor=delta.cursor,
            version_steps={version: steps[version] for version in sorted(steps)[-MAX_VERSION_STEPS:]},
            settlements=delta.settlements,
            earlier=delta.earlier,
            unfinished=delta.unfinished,
            counts=delta.counts,
            wall_s=self.progress.wall_s,
            losses=self.progress.losses,
            settings=self.live_config.settings,
            guard=self.live_config.guard,
            data=self.intake.source.data,
        )
        self.checkpointer.begin(record, delta)

    def _checkpoint_if_due(self, is_due: bool, would_help: bool) -> None:
        """`would_help`, without being due. One that is due while another one is being written waits its turn."""
        self.checkpointer.is_due |= is_due
        if not self.checkpointer.is_busy and (self.checkpointer.is_due or would_help):
            self._checkpoint()

    def _would_checkpoint_help(self, has_time: bool = False) -> bool:
        """Groups could leave Redis, and it is time for that: it is full, or has too many, or there is nothing to do."""
        log = self.intake.settlement_log
        if self.waits.is_waiting(Reason.REDIS_REFUSING):
            return bool(log.unsettled_bytes or log.checkpointed)
        return log.unsettled_bytes > (0 if has_time else MAX_HELD_BYTES)

    def _checkpoint_at_last(self) -> None:
        """The last one must succeed: tried again until the deadline, or once when told to stop."""
        self.checkpointer.wait()
        self._checkpoint()
        self.checkpointer.wait()
        while self.checkpointer.is_due and not self.switches.stop.wait(WAIT_POLL_S):
            self._checkpoint()
            self.checkpointer.wait()
        if self.checkpointer.is_due:
            raise CheckpointError(f"stopped without a checkpoint of step {self.progress.step}: {self.waits.describe()}")

    def _apply_desired_state(self) -> None:
        """What is ordered beside pause and stop."""
        desired, applied = self.intake.control_state.desired_state, self._applied
        self._applied = desired
        if desired.settings != applied.settings:
            self._change_settings(desired.settings)
        self._is_checkpoint_requested |= desired.checkpoints > applied.checkpoints
        if self._is_checkpoint_requested and not self.checkpointer.is_busy:
            self._is_checkpoint_requested = False
            self._checkpoint()
        self.evaluator.is_due |= desired.evaluations > applied.evaluations
        self.reporter.refresh_paused_phase()

    def _change_settings(self, settings: Settings) -> None:
        """From the next step on, and for tickets issued from now on; what is impossible changes nothing."""
        change = {"version": settings.version, "step": self.progress.step, "values": settings.values}
        try:
            self.live_config.apply_settings(settings)
        except ValueError as error:
            _log.error("settings of version %d are refused: %s", settings.version, error)
            self.store.add_event("settings_refused", change | {"reason": str(error)})
            return
        self._configure()
        _log.info("settings of version %d count after step %d: %s", *change.values())
        self.store.add_event("settings_applied", change)
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
        """Raises what has gone wrong beside the loop."""
        self.publisher.raise_failure()
        self.checkpointer.raise_failure()

    def _begin_evaluation_if_due(self) -> None:
        is_ending = self.is_at_last_step or self.switches.stop.is_set()
        if not is_ending and not self.intake.source.is_recording:
            self.evaluator.begin_if_due()

    def _evaluate_and_wait(self) -> bool:
        """Nothing is published meanwhile, so that every completion is of this step's version. False when stopped."""
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
        """Neither steps nor tickets; an evaluation that runs is brought to its end."""
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
