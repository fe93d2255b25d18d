"""Checks that learning is stable: metrics of the last steps against thresholds, and the guard's level. Pure.

Thresholds apply to medians over the last steps, so a single odd batch raises no alarm.
"""

from headrace.common.metrics.thresholds import (
    EPISODE_THRESHOLDS,
    SMOOTHED_STEPS,
    THRESHOLDS,
    Threshold,
    logprob_gap_threshold,
)
from headrace.common.wire import one_line
from headrace.control.models.status import Level
from headrace.control.verdict.check_inputs import FINAL_PHASES, CheckInputs, CheckResult, check_result


def learning_checks(inputs: CheckInputs) -> list[CheckResult]:
    of_episodes = [one for one in EPISODE_THRESHOLDS if inputs.recent.get(one.name)]
    thresholds = [*THRESHOLDS, logprob_gap_threshold(inputs.is_exact), *of_episodes]
    return [*(_metric(inputs, threshold) for threshold in thresholds), _skipped_updates(inputs), _guard(inputs)]


def _metric(inputs: CheckInputs, threshold: Threshold) -> CheckResult:
    name, warn, alarm, text, advice, _ = threshold
    values = sorted(inputs.recent.get(name, ())[-SMOOTHED_STEPS:])
    if not values:
        return check_result(name, "healthy", "not measured yet", warn=warn, alarm=alarm)
    median = values[len(values) // 2]
    if not threshold.is_beyond(median, warn):
        return check_result(name, "healthy", f"{name} {median:.3g}", "", median, warn=warn, alarm=alarm)
    level: Level = "critical" if threshold.is_beyond(median, alarm) else "warning"
    return check_result(name, level, f"{text} ({name} {median:.3g})", advice, median, warn=warn, alarm=alarm)


def _skipped_updates(inputs: CheckInputs) -> CheckResult:
    values = inputs.recent.get("skipped_updates", [])[-SMOOTHED_STEPS:]
    skipped = sum(value > 0 for value in values)
    if skipped:
        level: Level = "critical" if skipped == SMOOTHED_STEPS else "warning"
        text = f"{skipped} of the last {len(values)} steps skipped updates because the gradient was not finite"
        return check_result("skipped_updates", level, text, "lower optimizer.lr", skipped, warn=1, alarm=SMOOTHED_STEPS)
    return check_result("skipped_updates", "healthy", "gradients are finite", "", 0, warn=1, alarm=SMOOTHED_STEPS)


def _guard(inputs: CheckInputs) -> CheckResult:
    if inputs.held_back and inputs.phase not in FINAL_PHASES:
        text = f"the guard has tightened the run: {one_line(inputs.held_back)}"
        advice = "it loosens by itself; if it tightens again, configure these values"
        return check_result("guard", "warning", text, advice)
    return check_result("guard", "healthy", "the guard has changed nothing")
