"""Is the run well? Facts in, findings out, the worst as one sentence. Pure, but for the memory of since when."""

from collections.abc import Sequence

from headrace.common.process.waiting import Reason
from headrace.control.models.status import Level, Verdict
from headrace.control.verdict.check_inputs import FINAL_PHASES, CheckInputs, CheckResult, check_result, without_duration
from headrace.control.verdict.learning_checks import learning_checks

LEARNER_SLOW_S, LEARNER_SILENT_S = 5.0, 15.0
NO_REPLICA_S = 60.0
"""Replicas that come and go leave a run without any for less."""
STARVED_S = 30.0
RECENT_DEAD_WINDOW_S = 600.0
MANY_DEAD_LETTERS = 20
UNAPPLIED_S = 60.0
"""Settings count from the next step; one that takes longer than this is worth a word."""
INSPECT_DEAD_LETTERS = (
    "headrace dead list tells why, and with a ticket by what; once that is mended, dead retry opens them again"
)
LEVELS_WORST_FIRST: tuple[Level, ...] = ("failed", "warning", "waiting", "ended", "healthy")
"""The worst first."""


def run_checks(inputs: CheckInputs) -> list[CheckResult]:
    """One for each thing that can be wrong, the worst first."""
    found = [
        _redis(inputs),
        _learner(inputs),
        _pending_commands(inputs),
        _replicas(inputs),
        _reward_failures(inputs),
        _starvation(inputs),
        _quarantine(inputs),
        _version_lag(inputs),
        _dead_letters(inputs),
        _checkpoint(inputs),
        _settings(inputs),
        *learning_checks(inputs),
    ]
    return sorted(found, key=lambda one: LEVELS_WORST_FIRST.index(one.check.level))


class VerdictTracker:
    """Remembers since when the present verdict stands."""

    def __init__(self) -> None:
        self._known: tuple[str, Level] | None = None
        self._since_at = 0.0

    def verdict(self, findings: Sequence[CheckResult], now: float) -> Verdict:
        worst, advice = findings[0]
        is_well = worst.level == "healthy"
        known = ("" if is_well else worst.name, worst.level)
        if known != self._known:
            self._known, self._since_at = known, now
        others = 0 if is_well else sum(one.check.level == worst.level for one in findings) - 1
        more = f" (and {others} more)" if others and worst.level in ("failed", "warning") else ""
        text = "healthy" if is_well else worst.text + more
        return Verdict(level=worst.level, text=text, advice=advice, since_at=self._since_at)


def _redis(inputs: CheckInputs) -> CheckResult:
    if inputs.redis_unavailable_s > 0:
        text = "Redis does not answer: what is shown is from before"
        return check_result(
            "redis", "failed", text, "see whether Redis runs; everybody waits for it and goes on after it"
        )
    return check_result("redis", "healthy", "Redis answers")


def _learner(inputs: CheckInputs) -> CheckResult:
    silent_s, value = inputs.learner_silent_s, {"warn": LEARNER_SLOW_S, "alarm": LEARNER_SILENT_S}
    match inputs.phase:
        case "finished":
            return check_result("learner", "ended", f"the run is complete: {inputs.step} steps")
        case "stopped":
            text = f"the run was stopped after step {inputs.step} of {inputs.steps}"
            return check_result("learner", "ended", text, "start it again under the same name to go on")
        case "starved":
            return check_result(
                "learner", "failed", f"the learner gave up: {without_duration(inputs.reason)}", "start it again"
            )
        case "failed":
            return check_result(
                "learner", "failed", f"the learner failed: {without_duration(inputs.reason)}", "see its log"
            )
    if silent_s > LEARNER_SILENT_S:
        advice = "see whether its process runs or is frozen; headrace up starts it again"
        return check_result("learner", "failed", "the learner does not answer", advice, silent_s, **value)
    if silent_s > LEARNER_SLOW_S:
        return check_result("learner", "warning", "the learner has not answered lately", "", silent_s, **value)
    if not inputs.phase:
        return check_result("learner", "waiting", "the learner is loading, or has not been started")
    return check_result("learner", "healthy", f"the learner answers: {inputs.phase}", "", silent_s, **value)


def _pending_commands(inputs: CheckInputs) -> CheckResult:
    if inputs.phase in FINAL_PHASES:
        return check_result("commands", "healthy", "nothing is ordered that is not obeyed")
    if inputs.is_stopping:
        return check_result("commands", "waiting", "stopping, as ordered: the step in progress, then a checkpoint")
    if inputs.is_paused:
        return check_result("commands", "waiting", "paused, as ordered", "resume it")
    return check_result("commands", "healthy", "nothing is ordered that is not obeyed")


def _replicas(inputs: CheckInputs) -> CheckResult:
    running = sum(replica.state in ("running", "paused") for replica in inputs.replicas)
    count = float(running)
    if inputs.phase in FINAL_PHASES or running:
        return check_result(
            "replicas", "healthy", f"{running} of {len(inputs.replicas)} replicas serve", "", count, warn=1
        )
    if inputs.desired_replicas == 0:
        advice = "order a number of replicas"
        return check_result("replicas", "waiting", "scaled to 0 replicas, as ordered", advice, count, warn=1)
    starting = [replica for replica in inputs.replicas if replica.state == "starting"]
    if starting:
        why = f": {without_duration(starting[0].reason)}" if starting[0].reason else ""
        return check_result("replicas", "waiting", f"no replica serves yet{why}", "", count, warn=1)
    if inputs.no_replica_s < NO_REPLICA_S:
        return check_result("replicas", "waiting", "no live replica", "", count, warn=1)
    text = "the learner starves: no live replica" if not inputs.replicas else "no replica serves"
    return check_result("replicas", "failed", text, "start replicas, or see their logs", count, warn=1)


def _reward_failures(inputs: CheckInputs) -> CheckResult:
    failing = [replica for replica in inputs.replicas if Reason.REWARDS in replica.reason]
    if failing and inputs.phase not in FINAL_PHASES:
        level: Level = "failed" if inputs.waiting_s > STARVED_S else "warning"
        text = f"{failing[0].name}: {without_duration(failing[0].reason)}"
        return check_result("rewards", level, text, INSPECT_DEAD_LETTERS, len(failing), warn=1)
    return check_result("rewards", "healthy", "rewards are computed", "", len(failing), warn=1)


def _starvation(inputs: CheckInputs) -> CheckResult:
    value = inputs.waiting_s
    limits = {"warn": STARVED_S, "alarm": inputs.starvation_deadline_s / 2}
    is_excused = inputs.is_paused or inputs.desired_replicas == 0 or inputs.phase in FINAL_PHASES
    if value > STARVED_S and not is_excused and any(replica.state == "running" for replica in inputs.replicas):
        level: Level = "failed" if value > limits["alarm"] else "warning"
        advice = "see whether the replicas' engines work, and whether nearly all groups are uniform"
        if inputs.num_recent_dead:
            advice = INSPECT_DEAD_LETTERS
        return check_result(
            "starved", level, "the learner starves: replicas serve, no batch comes", advice, value, **limits
        )
    return check_result("starved", "healthy", "batches come", "", value, **limits)


def _quarantine(inputs: CheckInputs) -> CheckResult:
    ill = [replica for replica in inputs.replicas if replica.state == "quarantined"]
    if ill and inputs.phase not in FINAL_PHASES:
        why = f"{ill[0].name}: {without_duration(ill[0].reason)}"
        text = f"{len(ill)} of {len(inputs.replicas)} replicas quarantined: {why}"
        return check_result(
            "quarantined", "warning", text, "see its log; drain it, another takes its place", len(ill), warn=1
        )
    return check_result("quarantined", "healthy", "no replica is quarantined", "", len(ill), warn=1)


def _version_lag(inputs: CheckInputs) -> CheckResult:
    serving = [replica for replica in inputs.replicas if replica.state == "running"]
    worst = max(serving, key=lambda replica: replica.versions_behind, default=None)
    most, limit = worst.versions_behind if worst else 0, inputs.max_staleness + 1
    if worst and most > limit:
        text = f"{worst.name} is {most} weight versions behind"
        return check_result("versions_behind", "warning", text, "see its log, and the network to it", most, warn=limit)
    return check_result("versions_behind", "healthy", "replicas have recent weights", "", most, warn=limit)


def _dead_letters(inputs: CheckInputs) -> CheckResult:
    count, limits = inputs.num_recent_dead, {"warn": 1.0, "alarm": float(MANY_DEAD_LETTERS)}
    if count:
        level: Level = "failed" if count >= MANY_DEAD_LETTERS else "warning"
        text = f"{count} ticket{'s' * (count > 1)} died in the last {RECENT_DEAD_WINDOW_S / 60:.0f} minutes"
        why = f", the latest: {inputs.dead_reason}" if inputs.dead_reason else ""
        return check_result("dead_letters", level, f"{text}{why}", INSPECT_DEAD_LETTERS, count, **limits)
    return check_result("dead_letters", "healthy", "no ticket has died lately", "", 0, **limits)


def _checkpoint(inputs: CheckInputs) -> CheckResult:
    if inputs.checkpoint_failing_s > 0:
        text = "the checkpoint cannot be written"
        return check_result(
            "checkpoint", "failed", text, "free disk space; those before it stand", inputs.checkpoint_failing_s
        )
    return check_result("checkpoint", "healthy", "checkpoints are written")


def _settings(inputs: CheckInputs) -> CheckResult:
    if inputs.settings_unapplied_s > UNAPPLIED_S and inputs.phase not in FINAL_PHASES:
        text = "changed settings wait for the learner's next step"
        return check_result("settings", "waiting", text, "", inputs.settings_unapplied_s, warn=UNAPPLIED_S)
    return check_result(
        "settings", "healthy", "settings are applied", "", inputs.settings_unapplied_s, warn=UNAPPLIED_S
    )
