"""The learner's loop, top to bottom: take a batch, take a step, publish, checkpoint, evaluate.

Guarantees: a group is trained once and counted in one state; a version is announced only after its files are
durable; a stop leaves a checkpoint from which the next start goes on; every wait has a deadline and a typed reason,
and while nothing can be done the learner keeps Redis small by a checkpoint.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.waiting import Reason, Waits
from services.learner.advice import Advice, Adviser
from services.learner.api import Switches
from services.learner.checkpoint import CheckpointError, save_checkpoint
from services.learner.checkpoint_record import MAX_VERSION_STEPS, Loss, Record
from services.learner.intake import Arrived, Intake
from services.learner.metrics import group_durations_s, staleness_metrics
from services.learner.report import MetricsFile
from services.learner.store import LearnerStore
from services.learner.trainer import Trainer
from services.learner.versions import Versions

SWITCH_POLL_S = 0.2
PATIENCE_S = 1.0
"""Between two looks at why no batch is there."""
IDLE_CHECKPOINT_S = 10.0
"""A learner that has waited this long uses the time for a checkpoint, so that consumed groups can leave Redis."""
MAX_HELD_BYTES = 256 << 20
"""Of consumed groups in Redis; more, and a checkpoint is due."""
_LOGGED = (
    "step",
    "held_out",
    "reward_mean",
    "loss",
    "gradient_norm",
    "kl_behaviour_proximal",
    "staleness_mean",
    "step_s",
)
_log = logging.getLogger(__name__)


class Starved(RuntimeError):
    """Nothing could be done for too long; the text says what was missing."""


@dataclass
class Progress:
    """Where the run is; `/status` shows it and a checkpoint keeps it."""

    step: int = 0
    phase: str = "starting"
    wall_s_before: float = 0.0
    """Of the run's earlier lives."""
    started: float = field(default_factory=time.monotonic)
    """When this life issued its first ticket."""
    latest: dict[str, Any] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    """Of Redis, over the run's lives."""

    @property
    def wall_s(self) -> float:
        return self.wall_s_before + time.monotonic() - self.started


@dataclass
class Loop:
    """Everything that a step touches."""

    config: RunConfig
    checkpoints: Path
    store: LearnerStore
    trainer: Trainer
    intake: Intake
    versions: Versions
    switches: Switches
    metrics: MetricsFile
    progress: Progress
    waits: Waits
    adviser: Adviser
    _is_checkpoint_due: bool = False
    _shown_at: float = field(default_factory=time.monotonic)

    def run(self) -> bool:
        """Until the last step, or until told to stop; True if the run is complete."""
        self._publish()
        if not self.intake.source.is_recording:
            self._wait_for_replica()
        self.progress.started = time.monotonic()
        self.intake.start()
        if self.progress.step == 0:
            self._evaluate_and_wait()
        while not self.is_at_last_step and not self.switches.stop.is_set():
            if self.switches.paused.is_set():
                self._wait_while_paused()
            elif self.intake.has_ended:
                break
            else:
                self._take_step()
        self.intake.is_admitting = False
        is_complete = not self.switches.stop.is_set() and self._evaluate_and_wait()
        self._checkpoint_at_last()
        self._show("finished" if is_complete else "stopped")
        return is_complete

    def _wait_for_replica(self) -> None:
        """Nobody could answer the first ticket before one serves."""
        self._show("waiting for a replica")
        while not any(replica.state == "running" for replica in self.intake.sight.replicas):
            self._wait_for_groups(Reason.NO_REPLICA)
            if self.switches.stop.wait(SWITCH_POLL_S):
                break
            self.intake.look_around()
        self._has_groups(Reason.NO_REPLICA)

    def _wait(self, reason: Reason, detail: str) -> float:
        """How long it has lasted. Raises `Starved` at the deadline."""
        deadline_s = self.config.learner.starvation_deadline_s
        lasted_s = self.waits.waiting(reason, detail, deadline_s)
        if lasted_s > deadline_s:
            raise Starved(f"{reason} for {lasted_s:.0f} s: {detail}")
        return lasted_s

    def _wait_for_groups(self, reason: Reason) -> float:
        """As `_wait`; but while generation is paused, as ordered, no deadline comes nearer."""
        if self.intake.sight.is_generation_paused:
            self.waits.over(reason)
            return self.waits.waiting(Reason.PAUSED, "generation is scaled to 0 replicas")
        self.waits.over(Reason.PAUSED)
        return self._wait(reason, self.intake.why_waiting())

    def _has_groups(self, reason: Reason) -> None:
        """They are there, or nobody waits for them any more."""
        self.waits.over(reason)
        self.waits.over(Reason.PAUSED)

    @property
    def is_at_last_step(self) -> bool:
        return self.progress.step >= self.config.learner.steps

    def _take_step(self) -> None:
        started = time.monotonic()
        self._show("waiting")
        batch = self._wait_for_batch()
        if batch is None:
            return
        waited = time.monotonic()
        self._show("training")
        row = self.trainer.train([arrived.group for arrived in batch], self.progress.step, self.intake.version_steps)
        trained = time.monotonic()
        self.progress.step += 1
        self._publish()
        self.intake.mark_trained(batch)
        published = time.monotonic()
        timings = {"wait_s": waited - started, "publish_s": published - trained, "step_s": published - started}
        tickets = {
            "tickets": [arrived.entry.ticket_id for arrived in batch],
            "group_s": group_durations_s([arrived.group for arrived in batch]),
        }
        staleness = staleness_metrics([arrived.staleness for arrived in batch])
        self._record("step", row | timings | staleness | self._whole_run() | tickets)
        is_due = self.progress.step % self.config.learner.checkpoint_interval_steps == 0
        if is_due or self._is_checkpoint_due or self.intake.books.held_bytes > MAX_HELD_BYTES:
            self._checkpoint()
        self._checkpoint_if_asked()
        self._evaluate_if_due()

    def _wait_for_batch(self) -> list[Arrived] | None:
        """None when interrupted, or when a recording has ended."""
        while not self._is_interrupted() and not self.intake.has_ended:
            batch = self.intake.take_batch(PATIENCE_S, self._is_interrupted)
            if batch is not None:
                self._has_groups(Reason.STARVED)
                return batch
            lasted_s = self._wait_for_groups(Reason.STARVED)
            self._show("waiting")
            if lasted_s > IDLE_CHECKPOINT_S and (self.intake.books.held_bytes or self._is_checkpoint_due):
                self._checkpoint()
        self._has_groups(Reason.STARVED)
        return None

    def _whole_run(self) -> dict[str, Any]:
        """What a row says of the run up to its step, rather than of the batch."""
        counts = self.intake.books.counts
        decided = max(1, counts["trained"] + counts["uniform"] + counts["stale"])
        rewards = self.intake.take_sampled_rewards()
        return {
            "reward_mean": sum(rewards) / max(1, len(rewards)),
            "version": self.versions.current,
            "generated_tokens": counts["generated_tokens"],
            "uniform_share": counts["uniform"] / decided,
            "stale_share": counts["stale"] / decided,
            "swap_pauses_ms": self.store.take_swap_pauses_ms(),
        }

    def _publish(self) -> None:
        self.versions.publish(self.trainer.policy.tensors(), self.progress.step)
        self.intake.advance(self.progress.step, self.versions.current)

    def _checkpoint(self) -> None:
        """If the disk refuses, the ones before stand, the run goes on, and it is tried again after the next step."""
        consumed = self.intake.consumed()
        steps = self.versions.steps
        record = Record(
            epoch=self.store.epoch,
            step=self.progress.step,
            version=self.versions.current,
            cursor=self.intake.source.cursor,
            version_steps={version: steps[version] for version in sorted(steps)[-MAX_VERSION_STEPS:]},
            settlements=consumed.settlements,
            earlier=self.intake.books.recorded,
            unfinished=consumed.unfinished,
            counts=dict(self.intake.books.counts),
            wall_s=self.progress.wall_s,
            losses=self.progress.losses,
        )
        try:
            save_checkpoint(self.checkpoints, record, self.trainer.state_tensors(), self.store.check_fence)
        except CheckpointError as error:
            self._is_checkpoint_due = True
            self._wait(Reason.CHECKPOINT, str(error))
            return
        self._is_checkpoint_due = False
        self.waits.over(Reason.CHECKPOINT)
        self.intake.checkpointed(consumed)

    def _checkpoint_at_last(self) -> None:
        """The last one must succeed: tried again until the deadline, or once when told to stop."""
        self._checkpoint()
        while self._is_checkpoint_due and not self.switches.stop.wait(PATIENCE_S):
            self._checkpoint()
        if self._is_checkpoint_due:
            raise CheckpointError(f"stopped without a checkpoint of step {self.progress.step}: {self.waits.describe()}")

    def _checkpoint_if_asked(self) -> None:
        if self.switches.checkpoint.is_set():
            self.switches.checkpoint.clear()
            self._checkpoint()

    def _evaluate_if_due(self) -> None:
        """Begins one every `interval_steps`, unless the one before is still running; collects what is done."""
        self._record_evaluation(self.intake.finished_evaluation())
        interval, step = self.config.evaluation.interval_steps, self.progress.step
        is_due = interval > 0 and step % interval == 0 and not self.is_at_last_step
        if is_due and not self.intake.is_evaluating and not self.intake.source.is_recording:
            self.intake.begin_evaluation(step, self.versions.current)

    def _evaluate_and_wait(self) -> bool:
        """Nothing is published meanwhile, so that every completion is of this step's version. False when stopped."""
        if self.intake.source.is_recording:
            return True
        self._show("evaluating")
        if self.intake.is_evaluating:
            self._record_evaluation(self._wait_for_evaluation())
        if not self.switches.stop.is_set():
            self.intake.begin_evaluation(self.progress.step, self.versions.current)
            self._record_evaluation(self._wait_for_evaluation())
        return not self.intake.is_evaluating and not self.switches.stop.is_set()

    def _wait_for_evaluation(self) -> dict[str, float] | None:
        """None when stopped."""
        while (result := self.intake.finished_evaluation(PATIENCE_S, self.switches.stop.is_set)) is None:
            if self.switches.stop.is_set():
                break
            self._wait_for_groups(Reason.EVALUATING)
        self._has_groups(Reason.EVALUATING)
        return result

    def _record_evaluation(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self._record("evaluation", dict(result))

    def _record(self, kind: str, row: dict[str, Any]) -> None:
        position = {"step": self.progress.step, "time_s": time.time(), "wall_s": self.progress.wall_s}
        row = {"kind": kind} | position | row
        self.store.record(kind, row)  # first: a learner that is fenced off here writes no row
        self.metrics.append(row)
        self.progress.latest[kind] = row
        _log.info("%s: %s", kind, ", ".join(f"{name} {row[name]:.4g}" for name in _LOGGED if name in row))

    def _wait_while_paused(self) -> None:
        self._show("paused")
        self.intake.is_admitting = False
        while self.switches.paused.is_set() and not self.switches.stop.wait(SWITCH_POLL_S):
            self.waits.waiting(Reason.PAUSED)
            self._checkpoint_if_asked()
        self.waits.over(Reason.PAUSED)
        self.intake.is_admitting = True

    def _is_interrupted(self) -> bool:
        return self.switches.stop.is_set() or self.switches.paused.is_set()

    def _show(self, phase: str) -> None:
        advice = self._advise()
        self.progress.phase = phase
        position = {"step": self.progress.step, "version": self.versions.current, "url": self.versions.url}
        advised = {"advised_replicas": advice.replicas, "advice": advice.reason}
        self.store.report({"phase": phase, "reason": self.waits.describe(), **position, **advised})

    def _advise(self) -> Advice:
        """By the phase that is over; neither an evaluation nor a pause says how many replicas are right."""
        now = time.monotonic()
        spent_s, self._shown_at = now - self._shown_at, now
        return self.adviser.observe(
            waited_s=spent_s if self.progress.phase == "waiting" else 0.0,
            worked_s=spent_s if self.progress.phase == "training" else 0.0,
            replicas=self.intake.sight.replicas,
            steps_in_queue=self.progress.latest.get("step", {}).get("staleness_in_queue_mean", 0.0),
        )

    def close(self) -> None:
        self.intake.stop()
        self.versions.close()
        self.metrics.close()
