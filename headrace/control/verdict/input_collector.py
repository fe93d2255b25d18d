"""Collects the inputs of the checks from a poll of Redis, the probe of the learner and the history.

It remembers what a single poll cannot show: how long a condition has lasted, the counters of each replica half a minute
ago, and the number of dead letters ten minutes ago.
"""

import re
from collections import deque
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.metrics.thresholds import (
    EPISODE_THRESHOLDS,
    SMOOTHED_STEPS,
    THRESHOLDS,
    has_exact_numerics,
    logprob_gap_threshold,
)
from headrace.common.process.waiting import Reason, decode_waits
from headrace.common.wire import Heartbeat
from headrace.control.polling.history import RunHistory
from headrace.control.polling.learner_probe import LearnerProbe
from headrace.control.polling.redis_poll import PollResult
from headrace.control.verdict.check_inputs import FINAL_PHASES, RECENT_DEAD_WINDOW_S, CheckInputs, ReplicaInput

RATE_WINDOW_S = 30.0
DEAD_SAMPLE_S = 10.0
WATCHED_METRICS = (*(one.name for one in (*THRESHOLDS, *EPISODE_THRESHOLDS)), "skipped_updates")
LOGPROB_GAP = logprob_gap_threshold(is_exact=True).name
"""Only steps with fresh tokens have it; its last value counts until a later step has one."""


class ConditionTimer:
    """Measures how long each of several conditions has been true."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def duration_s(self, condition: str, is_true: bool, now: float) -> float:
        """How long `condition` has been true without a break, at least a millisecond; 0 if it is false."""
        if not is_true:
            self._since.pop(condition, None)
            return 0.0
        return max(now - self._since.setdefault(condition, now), 1e-3)


class ReplicaRates(NamedTuple):
    """Rates of a replica over the last half minute; None until there are two heartbeats."""

    tokens_per_s: float | None = None
    idle_share: float | None = None


class ReplicaTracker:
    """Remembers recent heartbeats of the live replicas."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, Heartbeat]]] = {}
        self.seen_since_at: dict[str, float] = {}

    def add(self, heartbeats: list[Heartbeat], now: float) -> None:
        live = {beat.replica for beat in heartbeats}
        for gone in self._samples.keys() - live:
            del self._samples[gone], self.seen_since_at[gone]
        for beat in heartbeats:
            samples = self._samples.setdefault(beat.replica, deque())
            self.seen_since_at.setdefault(beat.replica, now)
            if samples and (beat.serving_s < samples[-1][1].serving_s or beat.url != samples[-1][1].url):
                samples.clear()  # a restart under the same name
            if not samples or beat != samples[-1][1]:
                samples.append((now, beat))
            while len(samples) > 2 and now - samples[1][0] > RATE_WINDOW_S:
                samples.popleft()

    def rates(self, replica: str) -> ReplicaRates:
        samples = self._samples.get(replica)
        if not samples or len(samples) < 2:
            return ReplicaRates()
        (first_at, first), (last_at, last) = samples[0], samples[-1]
        served_s = last.serving_s - first.serving_s
        return ReplicaRates(
            tokens_per_s=max(0, last.tokens_generated - first.tokens_generated) / max(last_at - first_at, 1e-3),
            idle_share=min(1.0, max(0.0, (last.waiting_s - first.waiting_s) / served_s)) if served_s > 0 else None,
        )


class CheckInputCollector:
    """Call `inputs` after every poll, successful or not."""

    def __init__(self) -> None:
        self.replicas = ReplicaTracker()
        self._timer = ConditionTimer()
        self._dead_letters: deque[tuple[float, int]] = deque()

    def inputs(
        self,
        poll: PollResult,
        config: RunConfig,
        probe: LearnerProbe,
        history: RunHistory,
        is_redis_unavailable: bool,
        now: float,
    ) -> CheckInputs:
        phase, waits = poll.learner.get("phase", ""), decode_waits(poll.learner.get("waits", ""))
        version = int_field(poll.learner, "weight_version")
        replicas = [
            ReplicaInput(beat.replica, beat.state, beat.reason, max(0, version - beat.weight_version), beat.waits)
            for beat in poll.heartbeats
        ]
        is_any_running = any(replica.state in ("running", "paused") for replica in replicas)
        is_waiting = phase in ("waiting", "waiting for a replica")
        starved_s = max(waits.get(Reason.WAITING_FOR_GROUPS, 0.0), waits.get(Reason.NO_REPLICA, 0.0))
        is_unapplied = int_field(poll.learner, "settings_version") != poll.desired_state.settings.version
        return CheckInputs(
            phase=phase,
            reason=poll.learner.get("reason", ""),
            step=int_field(poll.learner, "step"),
            steps=config.learner.steps,
            is_paused=poll.desired_state.is_paused,
            is_stopping=poll.desired_state.is_stopping,
            desired_replicas=poll.desired_state.desired_replicas,
            replicas=replicas,
            no_replica_s=self._timer.duration_s("no replica", not is_any_running, now),
            learner_silent_s=0.0 if phase in FINAL_PHASES else probe.silent_s,
            waiting_s=starved_s if is_waiting else 0.0,
            checkpoint_failing_s=self._timer.duration_s("checkpoint", Reason.CHECKPOINT_FAILING in waits, now),
            redis_unavailable_s=self._timer.duration_s("redis", is_redis_unavailable, now),
            num_recent_dead=self._num_recent_dead(poll.queues.dead_letters, now),
            dead_reason=poll.dead_reason,
            held_back=poll.learner.get("held_back", ""),
            settings_unapplied_s=self._timer.duration_s("settings", is_unapplied, now),
            recent={name: history.latest(name, SMOOTHED_STEPS) for name in WATCHED_METRICS}
            | {LOGPROB_GAP: history.latest_reported(LOGPROB_GAP, SMOOTHED_STEPS)},
            is_exact=has_exact_numerics(config.model.dtype, config.generation.engine.swap_mode),
            starvation_deadline_s=config.learner.starvation_deadline_s,
            max_staleness=config.learner.max_staleness,
        )

    def _num_recent_dead(self, count: int, now: float) -> int:
        """The growth of the dead letters within the window; retried and purged ones reduce it."""
        if not self._dead_letters or now - self._dead_letters[-1][0] >= DEAD_SAMPLE_S:
            self._dead_letters.append((now, count))
        while len(self._dead_letters) > 1 and now - self._dead_letters[0][0] > RECENT_DEAD_WINDOW_S:
            self._dead_letters.popleft()
        return max(0, count - min(sample for _, sample in self._dead_letters))


def int_field(fields: dict[str, str], name: str) -> int:
    text = fields.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0
