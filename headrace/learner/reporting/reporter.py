"""What the learner tells of itself: rows of metrics, the phase that it is in, groups for people to read.

A row goes to Redis first, so that a learner that is fenced off there writes none, then to `metrics.jsonl` and the
trackers.
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
from headrace.learner.intake.intake import Arrived, Intake
from headrace.learner.intake.samples import TokenTexts, shown_group
from headrace.learner.reporting.summary import MetricsFile
from headrace.learner.reporting.trackers import Trackers
from headrace.learner.scaling.advice import Advice, Adviser
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.step_metrics import group_durations_s, staleness_metrics
from headrace.learner.training.trainer import Trainer
from headrace.learner.weights.publisher import Versions

_LOGGED = (
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
class Telling:
    """Reads what it tells from the parts of the loop, and changes none of them but `progress`."""

    store: LearnerStore
    trainer: Trainer
    intake: Intake
    versions: Versions
    switches: Switches
    progress: Progress
    waits: Waits
    adviser: Adviser
    metrics: MetricsFile
    trackers: Trackers
    token_texts: TokenTexts
    live_config: LiveConfig
    _is_shown_paused: bool = False
    _shown_at: float = field(default_factory=time.monotonic)

    def phase(self, phase: str) -> None:
        """Begins now."""
        advice = self._advise()
        self.progress.phase = phase
        self._is_shown_paused = self.switches.paused.is_set()
        if self._is_shown_paused and phase in ("waiting", "evaluating", "waiting for a replica"):
            phase = "paused"
        position = {"step": self.progress.step, "version": self.versions.current, "url": self.versions.url}
        position |= {"settings_version": self.live_config.settings.version, "held_back": self.live_config.held_back}
        advised = {"advised_replicas": advice.replicas, "advice": advice.reason}
        waits = {"reason": self.waits.describe(), "waits": msgspec.json.encode(self.waits.durations_s()).decode()}
        self.store.report({"phase": phase, **waits, **position, **advised})

    def guard(self, kind: str, reason: str, notch: int) -> None:
        """What it has done, and why."""
        done = {"warn": "warns", "tighten": "tightens", "loosen": "loosens"}[kind]
        text = f"the guard {done}: {reason}; {self.live_config.held_back or 'everything is as ordered'}"
        _log.log(logging.INFO if kind == "loosen" else logging.WARNING, text)
        event = {"action": kind, "reason": reason, "notch": notch, "step": self.progress.step, "text": text}
        self.store.announce("guard", event)

    def whether_paused(self) -> None:
        if self.switches.paused.is_set() != self._is_shown_paused:
            self.phase(self.progress.phase)

    def step(self, row: dict[str, Any], batch: list[Arrived]) -> None:
        """`row`: what is known of the batch's training."""
        tickets = {
            "tickets": [arrived.entry.ticket_id for arrived in batch],
            "group_s": group_durations_s([arrived.group for arrived in batch]),
        }
        staleness = staleness_metrics([arrived.staleness for arrived in batch])
        self.row("step", row | staleness | self._whole_run() | tickets)

    def row(self, kind: str, row: dict[str, Any]) -> None:
        position = {"step": self.progress.step, "time_s": time.time(), "wall_s": self.progress.wall_s}
        row = {"kind": kind} | position | row
        self.store.record(kind, row)
        self.metrics.append(row)
        self.trackers.write(row)
        self.progress.latest[kind] = row
        told = ", ".join(f"{name} {row[name]:.4g}" for name in _LOGGED if row.get(name) is not None)
        _log.info("%s: %s", kind, told, extra={"step": row["step"]})

    def groups(self) -> None:
        """A sample of those that were decided, for people to read."""
        decided = self.intake.take_sample()
        trained = [self.trainer.as_trained(one.group) if one.state == "trained" else [] for one in decided]
        if decided:
            self.store.show(
                shown_group(one, rollouts, self.token_texts) for one, rollouts in zip(decided, trained, strict=True)
            )

    def checkpoint(self, saved: Path, step: int, lasted_s: float) -> None:
        told = {"step": step, "time_s": time.time(), "seconds": lasted_s, "bytes": num_bytes_in(saved)}
        self.progress.latest["checkpoint"] = told
        self.store.report({f"checkpoint_{name}": value for name, value in told.items()})

    def _whole_run(self) -> dict[str, Any]:
        """What a row says of the run up to its step, rather than of the batch."""
        counts = self.intake.books.counts
        decided = max(1, counts["trained"] + counts["uniform"] + counts["stale"])
        rewards = self.intake.take_decided_rewards()
        return {
            "reward_mean": sum(rewards) / len(rewards),
            "version": self.versions.highest,  # that of this step, which is being published
            "generated_tokens": counts["generated_tokens"],
            "uniform_share": counts["uniform"] / decided,
            "stale_share": counts["stale"] / decided,
            "skipped_prompts": counts["skipped"],
            **self.intake.take_dropped(),
            "swap_pauses_ms": self.store.take_swap_pauses_ms(),
        }

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
        self.metrics.close()
        self.trackers.close()
