"""The learner's loop, top to bottom: take a batch, take a step, publish, checkpoint, evaluate.

Guarantees: a group is trained once and counted in one state; a version is announced only after its files are
durable; a stop leaves a checkpoint from which the next start goes on; every wait has a deadline and a reason.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import RunConfig
from services.learner.api import Switches
from services.learner.checkpoint import Record, save_checkpoint
from services.learner.intake import Intake
from services.learner.metrics import staleness_metrics
from services.learner.report import MetricsFile
from services.learner.store import LearnerStore
from services.learner.trainer import Trainer
from services.learner.versions import Versions

SWITCH_POLL_S = 0.2
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

    def run(self) -> bool:
        """Until the last step, or until told to stop; True if the run is complete."""
        self._publish()
        self._wait_for_replica()
        self.progress.started = time.monotonic()
        self.intake.start()
        if self.progress.step == 0:
            self._evaluate_and_wait()
        while not self.is_at_last_step and not self.switches.stop.is_set():
            if self.switches.paused.is_set():
                self._wait_while_paused()
            else:
                self._take_step()
        self.intake.is_admitting = False
        is_complete = self.is_at_last_step and self._evaluate_and_wait()
        self._checkpoint()
        self._show("finished" if is_complete else "stopped")
        return is_complete

    def _wait_for_replica(self) -> None:
        """Nobody could answer the first ticket before one serves. Raises `TimeoutError` if none does in time."""
        self._show("waiting for a replica")
        deadline = time.monotonic() + self.config.learner.starvation_timeout_s
        while not any(replica.state == "running" for replica in self.store.replicas()):
            if self.switches.stop.wait(SWITCH_POLL_S):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"no replica is running: {self.intake.why_waiting()}")

    @property
    def is_at_last_step(self) -> bool:
        return self.progress.step >= self.config.learner.steps

    def _take_step(self) -> None:
        started = time.monotonic()
        self._show("waiting")
        timeout_s = self.config.learner.starvation_timeout_s
        batch = self.intake.take_batch(timeout_s, self._is_interrupted)
        if batch is None:
            return
        waited = time.monotonic()
        self._show("training")
        row = self.trainer.train([arrived.group for arrived in batch], self.progress.step, self.versions.steps)
        trained = time.monotonic()
        self.progress.step += 1
        self._publish()
        self.intake.mark_trained(batch)
        published = time.monotonic()
        timings = {"wait_s": waited - started, "publish_s": published - trained, "step_s": published - started}
        self._record("step", row | timings | staleness_metrics([a.staleness for a in batch]) | self._whole_run())
        if self.progress.step % self.config.learner.checkpoint_interval_steps == 0:
            self._checkpoint()
        self._checkpoint_if_asked()
        self._evaluate_if_due()

    def _whole_run(self) -> dict[str, Any]:
        """What a row says of the run up to its step, rather than of the batch."""
        counts = self.intake.counts
        decided = max(1, counts["trained"] + counts["uniform"] + counts["stale"])
        rewards = self.intake.take_sampled_rewards()
        return {
            "reward_mean": sum(rewards) / max(1, len(rewards)),
            "version": self.versions.current,
            "wall_s": self.progress.wall_s,
            "generated_tokens": counts["generated_tokens"],
            "uniform_share": counts["uniform"] / decided,
            "stale_share": counts["stale"] / decided,
            "swap_pauses_ms": self.store.take_swap_pauses_ms(),
        }

    def _publish(self) -> None:
        self.versions.publish(self.trainer.policy.tensors(), self.progress.step)
        self.intake.advance(self.progress.step, self.versions.current)

    def _checkpoint(self) -> None:
        consumed = self.intake.consumed()
        record = Record(
            step=self.progress.step,
            version=self.versions.current,
            cursor=self.intake.source.cursor,
            version_steps=self.versions.steps,
            settlements=consumed,
            counts=dict(self.intake.counts),
            wall_s=self.progress.wall_s,
        )
        save_checkpoint(self.checkpoints, record, self.trainer.optimizer.state_tensors())
        self.intake.checkpointed(consumed)

    def _checkpoint_if_asked(self) -> None:
        if self.switches.checkpoint.is_set():
            self.switches.checkpoint.clear()
            self._checkpoint()

    def _evaluate_if_due(self) -> None:
        """Begins one every `interval_steps`, unless the one before is still running; collects what is done."""
        self._record_evaluation(self.intake.finished_evaluation())
        interval, step = self.config.evaluation.interval_steps, self.progress.step
        is_due = interval > 0 and step % interval == 0 and not self.is_at_last_step
        if is_due and not self.intake.is_evaluating:
            self.intake.begin_evaluation(step, self.versions.current)

    def _evaluate_and_wait(self) -> bool:
        """Nothing is published meanwhile, so that every completion is of this step's version. False when stopped."""
        self._show("evaluating")
        if self.intake.is_evaluating:
            self._record_evaluation(self._wait_for_evaluation())
        if not self.switches.stop.is_set():
            self.intake.begin_evaluation(self.progress.step, self.versions.current)
            self._record_evaluation(self._wait_for_evaluation())
        return not self.intake.is_evaluating and not self.switches.stop.is_set()

    def _wait_for_evaluation(self) -> dict[str, float] | None:
        """None when stopped. Raises `TimeoutError` with what is missing."""
        timeout_s = self.config.learner.starvation_timeout_s
        result = self.intake.finished_evaluation(timeout_s, self.switches.stop.is_set)
        if result is None and not self.switches.stop.is_set():
            raise TimeoutError(f"no evaluation within {timeout_s:.0f} s: {self.intake.why_waiting()}")
        return result

    def _record_evaluation(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self._record("evaluation", dict(result))

    def _record(self, kind: str, row: dict[str, Any]) -> None:
        row = {"kind": kind, "step": self.progress.step, "time_s": time.time()} | row
        self.metrics.append(row)
        self.progress.latest[kind] = row
        self.store.announce(kind, row)
        _log.info("%s: %s", kind, ", ".join(f"{name} {row[name]:.4g}" for name in _LOGGED if name in row))

    def _wait_while_paused(self) -> None:
        self._show("paused")
        self.intake.is_admitting = False
        while self.switches.paused.is_set() and not self.switches.stop.wait(SWITCH_POLL_S):
            self._checkpoint_if_asked()
        self.intake.is_admitting = True

    def _is_interrupted(self) -> bool:
        return self.switches.stop.is_set() or self.switches.paused.is_set()

    def _show(self, phase: str) -> None:
        self.progress.phase = phase
        self.store.report({"phase": phase, "step": self.progress.step, "version": self.versions.current})

    def close(self) -> None:
        self.intake.stop()
        self.versions.close()
        self.metrics.close()
