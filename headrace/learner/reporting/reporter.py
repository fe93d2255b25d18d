"""Reports the run's state: rows of metrics, the learner's phase, samples of groups for people to read.

A row is written to Redis first, so that a fenced learner writes none, then to `metrics.jsonl` and the trackers.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.process.waiting import Waits
from headrace.learner.checkpoints.checkpoint import num_bytes_in
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.pending_groups import PendingGroup
from headrace.learner.reporting.group_samples import group_sample
from headrace.learner.reporting.summary import MetricsFile
from headrace.learner.reporting.token_texts import TokenTexts
from headrace.learner.reporting.trackers import Trackers
from headrace.learner.scaling.advice import Advice, ReplicaAdviser
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.step_metrics import group_durations_s, staleness_metrics
from headrace.learner.training.trainer import Trainer
from headrace.learner.weights.publisher import WeightVersions

_LOGGED = (
    "held_out",
    "sampled_reward_mean",
    "loss",
    "gradient_norm",
    "kl_behaviour_proximal",
    "staleness_mean",
    "step_s",
)
_log = logging.getLogger(__name__)


@dataclass
class RunReporter:
    """Reads the loop's components to report on them; the only one that it changes is `progress`."""

    store: LearnerStore
    trainer: Trainer
    intake: Intake
    versions: WeightVersions
    switches: Switches
    progress: Progress
    waits: Waits
    adviser: ReplicaAdviser
    metrics: MetricsFile
    trackers: Trackers
    token_texts: TokenTexts
    live_config: LiveConfig
    _is_reported_paused: bool = False
    _reported_at: float = field(default_factory=time.monotonic)

    def enter_phase(self, phase: str) -> None:
        """Reports that `phase` begins now, with the advised number of replicas."""
        advice = self._advise()
        self.progress.phase = phase
        self._is_reported_paused = self.switches.paused.is_set()
        if self._is_reported_paused and phase in ("waiting", "evaluating", "waiting for a replica"):
            phase = "paused"
        position = {"step": self.progress.step, "weight_version": self.versions.current, "url": self.versions.url}
        position |= {
            "settings_version": self.live_config.settings.version,
            "held_back": self.live_config.guard_overrides,
        }
        advised = {"advised_replicas": advice.replicas, "advice": advice.reason}
        waits = {"reason": self.waits.describe(), "waits": msgspec.json.encode(self.waits.durations_s()).decode()}
        self.store.run_log.set_status({"phase": phase, **waits, **position, **advised})

    def report_guard(self, kind: str, reason: str, level: int) -> None:
        """Reports an action of the divergence guard, with its reason."""
        action = {"warn": "warns", "tighten": "tightens", "loosen": "loosens"}[kind]
        text = f"the guard {action}: {reason}; {self.live_config.guard_overrides or 'no setting is tightened'}"
        _log.log(logging.INFO if kind == "loosen" else logging.WARNING, text)
        event = {"action": kind, "reason": reason, "level": level, "step": self.progress.step, "text": text}
        self.store.run_log.add_event("guard", event)

    def refresh_paused_phase(self) -> None:
        """Reports the phase again if the learner was paused or resumed since."""
        if self.switches.paused.is_set() != self._is_reported_paused:
            self.enter_phase(self.progress.phase)

    def report_step(self, row: dict[str, Any], batch: list[PendingGroup]) -> None:
        """Writes the step's row: `row`, the training metrics, and what is known of the batch and the whole run."""
        tickets = {
            "tickets": [pending.entry.ticket_id for pending in batch],
            "group_durations_s": group_durations_s([pending.group for pending in batch]),
        }
        staleness = staleness_metrics([pending.staleness for pending in batch])
        self.write_row("step", row | staleness | self._run_metrics() | tickets)

    def write_row(self, kind: str, row: dict[str, Any]) -> None:
        position = {"step": self.progress.step, "time_s": time.time(), "wall_s": self.progress.wall_s}
        row = {"kind": kind} | position | row
        self.store.run_log.append_row(kind, row)
        self.metrics.append(row)
        self.trackers.write(row)
        self.progress.latest[kind] = row
        logged = ", ".join(f"{name} {row[name]:.4g}" for name in _LOGGED if row.get(name) is not None)
        _log.info("%s: %s", kind, logged, extra={"step": row["step"]})

    def write_group_samples(self) -> None:
        """Writes a sample of the groups that were settled since, for people to read."""
        decided = self.intake.outcomes.take_samples()
        trained = [self.trainer.trained_rollouts(one.group) if one.state == "trained" else [] for one in decided]
        if decided:
            self.store.run_log.add_samples(
                group_sample(one, rollouts, self.token_texts) for one, rollouts in zip(decided, trained, strict=True)
            )

    def report_checkpoint(self, saved: Path, step: int, lasted_s: float) -> None:
        row = {"step": step, "time_s": time.time(), "seconds": lasted_s, "bytes": num_bytes_in(saved)}
        self.progress.latest["checkpoint"] = row
        self.store.run_log.set_status({f"checkpoint_{name}": value for name, value in row.items()})

    def _run_metrics(self) -> dict[str, Any]:
        """The numbers of a step's row that describe the run up to that step rather than the batch."""
        counts = self.intake.settlement_log.counts
        decided = max(1, counts["trained"] + counts["uniform"] + counts["stale"])
        rewards = self.intake.outcomes.take_rewards()
        return {
            "sampled_reward_mean": sum(rewards) / len(rewards),
            "weight_version": self.versions.highest,  # this step's version, which is being published
            "run_generated_tokens": counts["generated_tokens"],
            "run_uniform_share": counts["uniform"] / decided,
            "run_stale_share": counts["stale"] / decided,
            "skipped_prompts": counts["skipped"],
            **self.intake.outcomes.take_drop_statistics(),
            "swap_pauses_ms": self.store.run_log.take_swap_pauses_ms(),
        }

    def _advise(self) -> Advice:
        """Advice after the phase that ends now. Evaluations and pauses count as neither waiting nor working: they do
        not show how many replicas are needed."""
        now = time.monotonic()
        spent_s, self._reported_at = now - self._reported_at, now
        return self.adviser.observe(
            waited_s=spent_s if self.progress.phase == "waiting" else 0.0,
            worked_s=spent_s if self.progress.phase == "training" else 0.0,
            replicas=self.intake.control_state.replicas,
            steps_in_queue=self.progress.latest.get("step", {}).get("staleness_in_queue_mean", 0.0),
        )

    def close(self) -> None:
        self.metrics.close()
        self.trackers.close()
