"""Is the run well? Facts in, findings out, the worst as one sentence. Pure, but for the memory of since when."""

from collections.abc import Sequence

from headrace.common.process.waiting import Reason
from headrace.control.models import Level, Verdict
from headrace.control.verdict.check_inputs import FINAL_PHASES, Facts, Finding, finding, plain
from headrace.control.verdict.learning_checks import learning_findings

LEARNER_SLOW_S, LEARNER_SILENT_S = 5.0, 15.0
NO_REPLICA_S = 60.0
"""Replicas that come and go leave a run without any for less."""
STARVED_S = 30.0
DEAD_WINDOW_S = 600.0
MANY_DEAD = 20
UNAPPLIED_S = 60.0
"""Settings count from the next step; one that takes longer than this is worth a word."""
SEE_DEAD = "headrace dead list tells why, and with a ticket by what; once that is mended, dead retry opens them again"
ORDER: tuple[Level, ...] = ("failed", "warning", "waiting", "ended", "healthy")
"""The worst first."""


def findings_of(facts: Facts) -> list[Finding]:
    """One for each thing that can be wrong, the worst first."""
    found = [
        _redis(facts),
        _learner(facts),
        _orders(facts),
        _replicas(facts),
        _rewards(facts),
        _starved(facts),
        _quarantined(facts),
        _behind(facts),
        _dead(facts),
        _checkpoint(facts),
        _settings(facts),
        *learning_findings(facts),
    ]
    return sorted(found, key=lambda one: ORDER.index(one.check.level))


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
        others = 0 if is_well else sum(one.check.level == worst.level for one in findings) - 1
        more = f" (and {others} more)" if others and worst.level in ("failed", "warning") else ""
        text = "healthy" if is_well else worst.text + more
        return Verdict(level=worst.level, text=text, advice=advice, since_at=self._since_at)


def _redis(facts: Facts) -> Finding:
    if facts.redis_away_s > 0:
        text = "Redis does not answer: what is shown is from before"
        return finding("redis", "failed", text, "see whether Redis runs; everybody waits for it and goes on after it")
    return finding("redis", "healthy", "Redis answers")


def _learner(facts: Facts) -> Finding:
    silent_s, value = facts.learner_silent_s, {"warn": LEARNER_SLOW_S, "alarm": LEARNER_SILENT_S}
    match facts.phase:
        case "finished":
            return finding("learner", "ended", f"the run is complete: {facts.step} steps")
        case "stopped":
            text = f"the run was stopped after step {facts.step} of {facts.steps}"
            return finding("learner", "ended", text, "start it again under the same name to go on")
        case "starved":
            return finding("learner", "failed", f"the learner gave up: {plain(facts.reason)}", "start it again")
        case "failed":
            return finding("learner", "failed", f"the learner failed: {plain(facts.reason)}", "see its log")
    if silent_s > LEARNER_SILENT_S:
        advice = "see whether its process runs or is frozen; headrace up starts it again"
        return finding("learner", "failed", "the learner does not answer", advice, silent_s, **value)
    if silent_s > LEARNER_SLOW_S:
        return finding("learner", "warning", "the learner has not answered lately", "", silent_s, **value)
    if not facts.phase:
        return finding("learner", "waiting", "the learner is loading, or has not been started")
    return finding("learner", "healthy", f"the learner answers: {facts.phase}", "", silent_s, **value)


def _orders(facts: Facts) -> Finding:
    if facts.phase in FINAL_PHASES:
        return finding("orders", "healthy", "nothing is ordered that is not obeyed")
    if facts.is_stopping:
        return finding("orders", "waiting", "stopping, as ordered: the step in progress, then a checkpoint")
    if facts.is_paused:
        return finding("orders", "waiting", "paused, as ordered", "resume it")
    return finding("orders", "healthy", "nothing is ordered that is not obeyed")


def _replicas(facts: Facts) -> Finding:
    running = sum(replica.state in ("running", "paused") for replica in facts.replicas)
    count = float(running)
    if facts.phase in FINAL_PHASES or running:
        return finding("replicas", "healthy", f"{running} of {len(facts.replicas)} replicas serve", "", count, warn=1)
    if facts.desired_replicas == 0:
        advice = "order a number of replicas"
        return finding("replicas", "waiting", "scaled to 0 replicas, as ordered", advice, count, warn=1)
    starting = [replica for replica in facts.replicas if replica.state == "starting"]
    if starting:
        why = f": {plain(starting[0].reason)}" if starting[0].reason else ""
        return finding("replicas", "waiting", f"no replica serves yet{why}", "", count, warn=1)
    if facts.no_replica_s < NO_REPLICA_S:
        return finding("replicas", "waiting", "no live replica", "", count, warn=1)
    text = "the learner starves: no live replica" if not facts.replicas else "no replica serves"
    return finding("replicas", "failed", text, "start replicas, or see their logs", count, warn=1)


def _rewards(facts: Facts) -> Finding:
    failing = [replica for replica in facts.replicas if Reason.REWARDS in replica.reason]
    if failing and facts.phase not in FINAL_PHASES:
        level: Level = "failed" if facts.waiting_s > STARVED_S else "warning"
        text = f"{failing[0].name}: {plain(failing[0].reason)}"
        return finding("rewards", level, text, SEE_DEAD, len(failing), warn=1)
    return finding("rewards", "healthy", "rewards are computed", "", len(failing), warn=1)


def _starved(facts: Facts) -> Finding:
    value = facts.waiting_s
    limits = {"warn": STARVED_S, "alarm": facts.starvation_deadline_s / 2}
    is_excused = facts.is_paused or facts.desired_replicas == 0 or facts.phase in FINAL_PHASES
    if value > STARVED_S and not is_excused and any(replica.state == "running" for replica in facts.replicas):
        level: Level = "failed" if value > limits["alarm"] else "warning"
        advice = "see whether the replicas' engines work, and whether nearly all groups are uniform"
        if facts.num_dead_lately:
            advice = SEE_DEAD
        return finding("starved", level, "the learner starves: replicas serve, no batch comes", advice, value, **limits)
    return finding("starved", "healthy", "batches come", "", value, **limits)


def _quarantined(facts: Facts) -> Finding:
    ill = [replica for replica in facts.replicas if replica.state == "quarantined"]
    if ill and facts.phase not in FINAL_PHASES:
        text = f"{len(ill)} of {len(facts.replicas)} replicas quarantined: {ill[0].name}: {plain(ill[0].reason)}"
        return finding(
            "quarantined", "warning", text, "see its log; drain it, another takes its place", len(ill), warn=1
        )
    return finding("quarantined", "healthy", "no replica is quarantined", "", len(ill), warn=1)


def _behind(facts: Facts) -> Finding:
    serving = [replica for replica in facts.replicas if replica.state == "running"]
    worst = max(serving, key=lambda replica: replica.versions_behind, default=None)
    most, limit = worst.versions_behind if worst else 0, facts.max_staleness + 1
    if worst and most > limit:
        text = f"{worst.name} is {most} weight versions behind"
        return finding("versions_behind", "warning", text, "see its log, and the network to it", most, warn=limit)
    return finding("versions_behind", "healthy", "replicas have recent weights", "", most, warn=limit)


def _dead(facts: Facts) -> Finding:
    count, limits = facts.num_dead_lately, {"warn": 1.0, "alarm": float(MANY_DEAD)}
    if count:
        level: Level = "failed" if count >= MANY_DEAD else "warning"
        text = f"{count} ticket{'s' * (count > 1)} died in the last {DEAD_WINDOW_S / 60:.0f} minutes"
        why = f", the latest: {facts.dead_reason}" if facts.dead_reason else ""
        return finding("dead", level, f"{text}{why}", SEE_DEAD, count, **limits)
    return finding("dead", "healthy", "no ticket has died lately", "", 0, **limits)


def _checkpoint(facts: Facts) -> Finding:
    if facts.checkpoint_failing_s > 0:
        text = "the checkpoint cannot be written"
        return finding(
            "checkpoint", "failed", text, "free disk space; those before it stand", facts.checkpoint_failing_s
        )
    return finding("checkpoint", "healthy", "checkpoints are written")


def _settings(facts: Facts) -> Finding:
    if facts.unapplied_s > UNAPPLIED_S and facts.phase not in FINAL_PHASES:
        text = "changed settings wait for the learner's next step"
        return finding("settings", "waiting", text, "", facts.unapplied_s, warn=UNAPPLIED_S)
    return finding("settings", "healthy", "settings are applied", "", facts.unapplied_s, warn=UNAPPLIED_S)
