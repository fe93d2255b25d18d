"""Is the run well? Facts in, findings out, the worst of them as one sentence. Pure, but for the memory of since when.

Thresholds are of medians over the last steps, so that one odd batch raises no alarm.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.control.models import Check, Level, Verdict

SMOOTHED_STEPS = 5
LEARNER_SLOW_S, LEARNER_SILENT_S = 5.0, 15.0
NO_REPLICA_S = 60.0
"""Replicas that come and go leave a run without any for less."""
STARVED_S = 30.0
DEAD_WINDOW_S = 600.0
MANY_DEAD = 20
UNAPPLIED_S = 60.0
"""Settings count from the next step; one that takes longer than this is worth a word."""
FINAL_PHASES = ("finished", "stopped", "starved", "failed")
ORDER: tuple[Level, ...] = ("failed", "warning", "waiting", "ended", "healthy")
"""The worst first."""


class ReplicaFact(NamedTuple):
    name: str
    state: str
    reason: str
    versions_behind: int


@dataclass(frozen=True)
class Facts:
    """What the findings are made of; durations in seconds, up to now."""

    phase: str = ""
    """As the learner has written it; empty: none is there yet."""
    reason: str = ""
    step: int = 0
    steps: int = 0
    is_paused: bool = False
    is_stopping: bool = False
    desired_replicas: int | None = None
    replicas: Sequence[ReplicaFact] = ()
    no_replica_s: float = 0.0
    """Since a replica was last running."""
    learner_silent_s: float = 0.0
    """Since the learner last answered; 0 where it has told no address."""
    waiting_s: float = 0.0
    """For how long the learner has had nothing to train on."""
    checkpoint_failing_s: float = 0.0
    redis_away_s: float = 0.0
    num_dead_lately: int = 0
    unapplied_s: float = 0.0
    """How long settings have waited for the learner."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """Of each watched metric the last steps' values."""
    is_full_precision: bool = False
    starvation_deadline_s: float = 1800.0
    max_staleness: int = 2


class Finding(NamedTuple):
    check: Check
    advice: str = ""


class Threshold(NamedTuple):
    name: str
    warn: float
    alarm: float
    text: str
    advice: str
    is_floor: bool = False
    """Low is bad."""


OFF_POLICY = "lower optimizer.lr or learner.max_staleness"
THRESHOLDS = (
    Threshold("kl_behaviour_proximal", 0.05, 0.2, "the policy is far from the one that sampled", OFF_POLICY),
    Threshold("ess", 0.5, 0.2, "few tokens carry the batch: the effective sample size is low", OFF_POLICY, True),
    Threshold("clip_fraction", 0.5, 0.8, "most tokens are clipped", "lower optimizer.lr, or widen actor.eps_clip"),
)
NUMERICS = "compare the engine's numerics with the learner's: dtype, kernels, sampling settings"


def findings_of(facts: Facts) -> list[Finding]:
    """One for each thing that can be wrong, the worst first."""
    found = [
        _redis(facts),
        _learner(facts),
        _orders(facts),
        _replicas(facts),
        _starved(facts),
        _quarantined(facts),
        _behind(facts),
        _dead(facts),
        _checkpoint(facts),
        _settings(facts),
        *(_metric(facts, threshold) for threshold in THRESHOLDS),
        _metric(facts, _numeric_gap(facts.is_full_precision)),
        _skipped_updates(facts),
    ]
    return sorted(found, key=lambda finding: ORDER.index(finding.check.level))


class Judge:
    """Remembers since when the present verdict stands."""

    def __init__(self) -> None:
        self._known: tuple[str, Level] | None = None
        self._since_at = 0.0

    def verdict(self, findings: Sequence[Finding], now: float) -> Verdict:
        worst, advice = findings[0]
        is_well = worst.level == "healthy"
        known = ("" if is_well else worst.name, worst.level)
        if known != self._known:
            self._known, self._since_at = known, now
        others = 0 if is_well else sum(finding.check.level == worst.level for finding in findings) - 1
        more = f" (and {others} more)" if others and worst.level in ("failed", "warning") else ""
        text = "healthy" if is_well else worst.text + more
        return Verdict(level=worst.level, text=text, advice=advice, since_at=self._since_at)


def _redis(facts: Facts) -> Finding:
    if facts.redis_away_s > 0:
        text = "Redis does not answer: what is shown is from before"
        return _finding("redis", "failed", text, "see whether Redis runs; everybody waits for it and goes on after it")
    return _finding("redis", "healthy", "Redis answers")


def _learner(facts: Facts) -> Finding:
    silent_s, value = facts.learner_silent_s, {"warn": LEARNER_SLOW_S, "alarm": LEARNER_SILENT_S}
    match facts.phase:
        case "finished":
            return _finding("learner", "ended", f"the run is complete: {facts.step} steps")
        case "stopped":
            text = f"the run was stopped after step {facts.step} of {facts.steps}"
            return _finding("learner", "ended", text, "start it again under the same name to go on")
        case "starved":
            return _finding("learner", "failed", f"the learner gave up: {_plain(facts.reason)}", "start it again")
        case "failed":
            return _finding("learner", "failed", f"the learner failed: {_plain(facts.reason)}", "see its log")
    if silent_s > LEARNER_SILENT_S:
        advice = "see whether its process runs or is frozen; headrace up starts it again"
        return _finding("learner", "failed", "the learner does not answer", advice, silent_s, **value)
    if silent_s > LEARNER_SLOW_S:
        return _finding("learner", "warning", "the learner has not answered lately", "", silent_s, **value)
    if not facts.phase:
        return _finding("learner", "waiting", "the learner is loading, or has not been started")
    return _finding("learner", "healthy", f"the learner answers: {facts.phase}", "", silent_s, **value)


def _orders(facts: Facts) -> Finding:
    if facts.phase in FINAL_PHASES:
        return _finding("orders", "healthy", "nothing is ordered that is not obeyed")
    if facts.is_stopping:
        return _finding("orders", "waiting", "stopping, as ordered: the step in progress, then a checkpoint")
    if facts.is_paused:
        return _finding("orders", "waiting", "paused, as ordered", "resume it")
    return _finding("orders", "healthy", "nothing is ordered that is not obeyed")


def _replicas(facts: Facts) -> Finding:
    running = sum(replica.state in ("running", "paused") for replica in facts.replicas)
    count = float(running)
    if facts.phase in FINAL_PHASES or running:
        return _finding("replicas", "healthy", f"{running} of {len(facts.replicas)} replicas serve", "", count, warn=1)
    if facts.desired_replicas == 0:
        advice = "order a number of replicas"
        return _finding("replicas", "waiting", "scaled to 0 replicas, as ordered", advice, count, warn=1)
    starting = [replica for replica in facts.replicas if replica.state == "starting"]
    if starting:
        why = f": {_plain(starting[0].reason)}" if starting[0].reason else ""
        return _finding("replicas", "waiting", f"no replica serves yet{why}", "", count, warn=1)
    if facts.no_replica_s < NO_REPLICA_S:
        return _finding("replicas", "waiting", "no live replica", "", count, warn=1)
    text = "the learner starves: no live replica" if not facts.replicas else "no replica serves"
    return _finding("replicas", "failed", text, "start replicas, or see their logs", count, warn=1)


def _starved(facts: Facts) -> Finding:
    value = facts.waiting_s
    limits = {"warn": STARVED_S, "alarm": facts.starvation_deadline_s / 2}
    is_excused = facts.is_paused or facts.desired_replicas == 0 or facts.phase in FINAL_PHASES
    if value > STARVED_S and not is_excused and any(replica.state == "running" for replica in facts.replicas):
        level: Level = "failed" if value > limits["alarm"] else "warning"
        advice = "see whether the replicas' engines work, and whether nearly all groups are uniform"
        return _finding(
            "starved", level, "the learner starves: replicas serve, no batch comes", advice, value, **limits
        )
    return _finding("starved", "healthy", "batches come", "", value, **limits)


def _quarantined(facts: Facts) -> Finding:
    ill = [replica for replica in facts.replicas if replica.state == "quarantined"]
    if ill and facts.phase not in FINAL_PHASES:
        text = f"{len(ill)} of {len(facts.replicas)} replicas quarantined: {ill[0].name}: {_plain(ill[0].reason)}"
        return _finding(
            "quarantined", "warning", text, "see its log; drain it, another takes its place", len(ill), warn=1
        )
    return _finding("quarantined", "healthy", "no replica is quarantined", "", len(ill), warn=1)


def _behind(facts: Facts) -> Finding:
    serving = [replica for replica in facts.replicas if replica.state == "running"]
    worst = max(serving, key=lambda replica: replica.versions_behind, default=None)
    most, limit = worst.versions_behind if worst else 0, facts.max_staleness + 1
    if worst and most > limit:
        text = f"{worst.name} is {most} weight versions behind"
        return _finding("versions_behind", "warning", text, "see its log, and the network to it", most, warn=limit)
    return _finding("versions_behind", "healthy", "replicas have recent weights", "", most, warn=limit)


def _dead(facts: Facts) -> Finding:
    count, limits = facts.num_dead_lately, {"warn": 1.0, "alarm": float(MANY_DEAD)}
    if count:
        level: Level = "failed" if count >= MANY_DEAD else "warning"
        text = f"{count} ticket{'s' * (count > 1)} died in the last {DEAD_WINDOW_S / 60:.0f} minutes"
        return _finding(
            "dead", level, text, "headrace dead list tells why; dead retry opens them again", count, **limits
        )
    return _finding("dead", "healthy", "no ticket has died lately", "", 0, **limits)


def _checkpoint(facts: Facts) -> Finding:
    if facts.checkpoint_failing_s > 0:
        text = "the checkpoint cannot be written"
        return _finding(
            "checkpoint", "failed", text, "free disk space; those before it stand", facts.checkpoint_failing_s
        )
    return _finding("checkpoint", "healthy", "checkpoints are written")


def _settings(facts: Facts) -> Finding:
    if facts.unapplied_s > UNAPPLIED_S and facts.phase not in FINAL_PHASES:
        text = "changed settings wait for the learner's next step"
        return _finding("settings", "waiting", text, "", facts.unapplied_s, warn=UNAPPLIED_S)
    return _finding("settings", "healthy", "settings are applied", "", facts.unapplied_s, warn=UNAPPLIED_S)


def _metric(facts: Facts, threshold: Threshold) -> Finding:
    name, warn, alarm, text, advice, is_floor = threshold
    values = sorted(facts.recent.get(name, ())[-SMOOTHED_STEPS:])
    if not values:
        return _finding(name, "healthy", "not measured yet", warn=warn, alarm=alarm)
    middle = values[len(values) // 2]
    sign = -1 if is_floor else 1
    if sign * middle <= sign * warn:
        return _finding(name, "healthy", f"{name} {middle:.3g}", "", middle, warn=warn, alarm=alarm)
    level: Level = "failed" if sign * middle > sign * alarm else "warning"
    return _finding(name, level, f"{text} ({name} {middle:.3g})", advice, middle, warn=warn, alarm=alarm)


def _numeric_gap(is_full_precision: bool) -> Threshold:
    warn, alarm = (0.01, 0.1) if is_full_precision else (1.0, 3.0)
    text = "engine and learner disagree on fresh tokens' log-probabilities"
    return Threshold("fresh_logprob_gap_max", warn, alarm, text, NUMERICS)


def _skipped_updates(facts: Facts) -> Finding:
    values = facts.recent.get("skipped_updates", [])[-SMOOTHED_STEPS:]
    skipped = sum(value > 0 for value in values)
    if skipped:
        level: Level = "failed" if skipped == SMOOTHED_STEPS else "warning"
        text = f"{skipped} of the last {len(values)} steps had updates skipped: their gradient was not finite"
        return _finding("skipped_updates", level, text, "lower optimizer.lr", skipped, warn=1, alarm=SMOOTHED_STEPS)
    return _finding("skipped_updates", "healthy", "gradients are finite", "", 0, warn=1, alarm=SMOOTHED_STEPS)


def _finding(
    name: str,
    level: Level,
    text: str,
    advice: str = "",
    value: float | None = None,
    warn: float | None = None,
    alarm: float | None = None,
) -> Finding:
    return Finding(Check(name=name, level=level, text=text, value=value, warn=warn, alarm=alarm), advice)


def _plain(reason: str) -> str:
    """Without how long it has lasted: a sentence that stands says since when beside it."""
    return re.sub(r" for \d+ s\b", "", reason).strip()
