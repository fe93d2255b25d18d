"""Is learning well? What the last steps say of how far the policy is from what sampled, against thresholds. Pure.

Thresholds are of medians over the last steps, so that one odd batch raises no alarm.
"""

from headrace.common.metrics.thresholds import SMOOTHED_STEPS, THRESHOLDS, Threshold, numeric_gap
from headrace.common.wire import one_line
from headrace.control.models import Level
from headrace.control.verdict.check_inputs import FINAL_PHASES, Facts, Finding, finding


def learning_findings(facts: Facts) -> list[Finding]:
    thresholds = [*THRESHOLDS, numeric_gap(facts.is_exact)]
    return [*(_metric(facts, threshold) for threshold in thresholds), _skipped_updates(facts), _guard(facts)]


def _metric(facts: Facts, threshold: Threshold) -> Finding:
    name, warn, alarm, text, advice, _ = threshold
    values = sorted(facts.recent.get(name, ())[-SMOOTHED_STEPS:])
    if not values:
        return finding(name, "healthy", "not measured yet", warn=warn, alarm=alarm)
    middle = values[len(values) // 2]
    if not threshold.is_beyond(middle, warn):
        return finding(name, "healthy", f"{name} {middle:.3g}", "", middle, warn=warn, alarm=alarm)
    level: Level = "failed" if threshold.is_beyond(middle, alarm) else "warning"
    return finding(name, level, f"{text} ({name} {middle:.3g})", advice, middle, warn=warn, alarm=alarm)


def _skipped_updates(facts: Facts) -> Finding:
    values = facts.recent.get("skipped_updates", [])[-SMOOTHED_STEPS:]
    skipped = sum(value > 0 for value in values)
    if skipped:
        level: Level = "failed" if skipped == SMOOTHED_STEPS else "warning"
        text = f"{skipped} of the last {len(values)} steps had updates skipped: their gradient was not finite"
        return finding("skipped_updates", level, text, "lower optimizer.lr", skipped, warn=1, alarm=SMOOTHED_STEPS)
    return finding("skipped_updates", "healthy", "gradients are finite", "", 0, warn=1, alarm=SMOOTHED_STEPS)


def _guard(facts: Facts) -> Finding:
    if facts.held_back and facts.phase not in FINAL_PHASES:
        text = f"the guard holds the run back: {one_line(facts.held_back)}"
        return finding("guard", "warning", text, "it loosens by itself; if it tightens again, keep what it has set")
    return finding("guard", "healthy", "the guard has nothing to do")
