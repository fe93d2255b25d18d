"""Is learning well? What the last steps say of how far the policy is from what sampled, against thresholds. Pure.

Thresholds are of medians over the last steps, so that one odd batch raises no alarm.
"""

from typing import NamedTuple

from services.control.finding import Facts, Finding, finding
from services.control.models import Level

SMOOTHED_STEPS = 5


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


def learning_findings(facts: Facts) -> list[Finding]:
    thresholds = [*THRESHOLDS, _numeric_gap(facts.is_full_precision)]
    return [*(_metric(facts, threshold) for threshold in thresholds), _skipped_updates(facts)]


def _metric(facts: Facts, threshold: Threshold) -> Finding:
    name, warn, alarm, text, advice, is_floor = threshold
    values = sorted(facts.recent.get(name, ())[-SMOOTHED_STEPS:])
    if not values:
        return finding(name, "healthy", "not measured yet", warn=warn, alarm=alarm)
    middle = values[len(values) // 2]
    sign = -1 if is_floor else 1
    if sign * middle <= sign * warn:
        return finding(name, "healthy", f"{name} {middle:.3g}", "", middle, warn=warn, alarm=alarm)
    level: Level = "failed" if sign * middle > sign * alarm else "warning"
    return finding(name, level, f"{text} ({name} {middle:.3g})", advice, middle, warn=warn, alarm=alarm)


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
        return finding("skipped_updates", level, text, "lower optimizer.lr", skipped, warn=1, alarm=SMOOTHED_STEPS)
    return finding("skipped_updates", "healthy", "gradients are finite", "", 0, warn=1, alarm=SMOOTHED_STEPS)
