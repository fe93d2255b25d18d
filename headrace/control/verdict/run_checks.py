"""Checks that the run works, one each for Redis, learner, replicas, tickets, checkpoints and settings. Pure."""

from headrace.common.process.waiting import Reason
from headrace.control.models.status import Level
from headrace.control.verdict.check_inputs import (
    FINAL_PHASES,
    RECENT_DEAD_WINDOW_S,
    CheckInputs,
    CheckResult,
    check_result,
    without_duration,
)

LEARNER_SLOW_S, LEARNER_SILENT_S = 5.0, 15.0
NO_REPLICA_S = 60.0
"""Shorter gaps without a replica are normal while replicas come and go."""
STARVED_S = 30.0
MANY_DEAD_LETTERS = 20
UNAPPLIED_S = 60.0
"""The learner applies settings at its next step; a step that takes longer than this is reported."""
INSPECT_DEAD_LETTERS = (
    "`headrace dead-letters list` shows the reason, with a ticket id the whole error; "
    "`dead-letters retry` requeues them after a fix"
)


def run_checks(inputs: CheckInputs) -> list[CheckResult]:
    return [
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
    ]


def _redis(inputs: CheckInputs) -> CheckResult:
    if inputs.redis_unavailable_s > 0:
        text = "Redis does not answer; the data shown is from before"
        advice = "check whether Redis runs; learner and replicas wait for it and then continue"
        return check_result("redis", "critical", text, advice)
    return check_result("redis", "healthy", "Redis answers")


def _learner(inputs: CheckInputs) -> CheckResult:
    silent_s, value = inputs.learner_silent_s, {"warn": LEARNER_SLOW_S, "alarm": LEARNER_SILENT_S}
    match inputs.phase:
        case "finished":
            return check_result("learner", "ended", f"the run is complete: {inputs.step} steps")
        case "stopped":
            text = f"the run was stopped after step {inputs.step} of {inputs.steps}"
            return check_result("learner", "ended", text, "start it again under the same name to continue")
        case "starved":
            text = f"the learner gave up waiting: {without_duration(inputs.reason)}"
            return check_result("learner", "critical", text, "start it again")
        case "failed":
            text = f"the learner failed: {without_duration(inputs.reason)}"
            return check_result("learner", "critical", text, "see its log")
    if silent_s > LEARNER_SILENT_S:
        advice = "check whether its process is running or frozen; headrace up restarts it"
        return check_result("learner", "critical", "the learner does not answer", advice, silent_s, **value)
    if silent_s > LEARNER_SLOW_S:
        return check_result("learner", "warning", "the learner has not answered lately", "", silent_s, **value)
    if not inputs.phase:
        return check_result("learner", "waiting", "the learner is loading, or has not been started")
    return check_result("learner", "healthy", f"the learner answers: {inputs.phase}", "", silent_s, **value)


def _pending_commands(inputs: CheckInputs) -> CheckResult:
    if inputs.is_stopping and inputs.phase not in FINAL_PHASES:
        text = "stopping on request: after the step in progress, with a checkpoint"
        return check_result("commands", "waiting", text)
    if inputs.is_paused and inputs.phase not in FINAL_PHASES:
        return check_result("commands", "waiting", "paused on request", "resume it")
    return check_result("commands", "healthy", "all commands have been carried out")


def _replicas(inputs: CheckInputs) -> CheckResult:
    running = sum(replica.state in ("running", "paused") for replica in inputs.replicas)
    count = float(running)
    if inputs.phase in FINAL_PHASES or running:
        text = f"{running} of {len(inputs.replicas)} replicas serve"
        return check_result("replicas", "healthy", text, "", count, warn=1)
    if inputs.desired_replicas == 0:
        return check_result("replicas", "waiting", "scaled to 0 replicas on request", "scale up", count, warn=1)
    starting = [replica for replica in inputs.replicas if replica.state == "starting"]
    if starting:
        why = f": {without_duration(starting[0].reason)}" if starting[0].reason else ""
        return check_result("replicas", "waiting", f"no replica serves yet{why}", "", count, warn=1)
    if inputs.no_replica_s < NO_REPLICA_S:
        return check_result("replicas", "waiting", "no live replica", "", count, warn=1)
    text = "the learner starves: no live replica" if not inputs.replicas else "no replica serves"
    return check_result("replicas", "critical", text, "start replicas, or see their logs", count, warn=1)


def _reward_failures(inputs: CheckInputs) -> CheckResult:
    failing = [replica for replica in inputs.replicas if Reason.REWARDS_FAILING in replica.waits]
    if failing and inputs.phase not in FINAL_PHASES:
        level: Level = "critical" if inputs.waiting_s > STARVED_S else "warning"
        text = f"{failing[0].name}: {without_duration(failing[0].reason)}"
        return check_result("rewards", level, text, INSPECT_DEAD_LETTERS, len(failing), warn=1)
    return check_result("rewards", "healthy", "rewards are computed", "", len(failing), warn=1)


def _starvation(inputs: CheckInputs) -> CheckResult:
    value = inputs.waiting_s
    limits = {"warn": STARVED_S, "alarm": inputs.starvation_deadline_s / 2}
    is_expected = inputs.is_paused or inputs.desired_replicas == 0 or inputs.phase in FINAL_PHASES
    if value > STARVED_S and not is_expected and any(replica.state == "running" for replica in inputs.replicas):
        level: Level = "critical" if value > limits["alarm"] else "warning"
        advice = "check whether the engines work, and whether nearly all groups are uniform"
        if inputs.num_recent_dead:
            advice = INSPECT_DEAD_LETTERS
        text = "the learner starves: replicas serve, but no batch arrives"
        return check_result("starved", level, text, advice, value, **limits)
    return check_result("starved", "healthy", "batches arrive", "", value, **limits)


def _quarantine(inputs: CheckInputs) -> CheckResult:
    ill = [replica for replica in inputs.replicas if replica.state == "quarantined"]
    if ill and inputs.phase not in FINAL_PHASES:
        why = f"{ill[0].name}: {without_duration(ill[0].reason)}"
        text = f"{len(ill)} of {len(inputs.replicas)} replicas quarantined: {why}"
        return check_result("quarantined", "warning", text, "see its log; drain it to replace it", len(ill), warn=1)
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
        level: Level = "critical" if count >= MANY_DEAD_LETTERS else "warning"
        what = "1 new dead letter" if count == 1 else f"{count} new dead letters"
        why = f", the latest: {inputs.dead_reason}" if inputs.dead_reason else ""
        text = f"{what} in the last {RECENT_DEAD_WINDOW_S / 60:.0f} minutes{why}"
        return check_result("dead_letters", level, text, INSPECT_DEAD_LETTERS, count, **limits)
    return check_result("dead_letters", "healthy", "no new dead letter", "", 0, **limits)


def _checkpoint(inputs: CheckInputs) -> CheckResult:
    failing_s = inputs.checkpoint_failing_s
    if failing_s > 0:
        text = "the checkpoint cannot be written"
        return check_result(
            "checkpoint", "critical", text, "free disk space; earlier checkpoints are intact", failing_s
        )
    return check_result("checkpoint", "healthy", "checkpoints are written")


def _settings(inputs: CheckInputs) -> CheckResult:
    value = inputs.settings_unapplied_s
    if value > UNAPPLIED_S and inputs.phase not in FINAL_PHASES:
        text = "changed settings wait for the learner's next step"
        return check_result("settings", "waiting", text, "", value, warn=UNAPPLIED_S)
    return check_result("settings", "healthy", "settings are applied", "", value, warn=UNAPPLIED_S)
