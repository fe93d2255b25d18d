"""The divergence guard: tightens the run when step metrics show that training drifts, and loosens it again. Pure.

Beyond a warning threshold it warns. Beyond an alarm threshold it tightens by one level: first it divides
`learner.max_staleness` by four, down to 1, then it halves `optimizer.lr`. After `CALM_STEPS` calm steps it goes back by
one level. A single odd batch has no effect. It watches the KL of the trained tokens, with an alarm threshold that is
reached early (docs/staleness.md), and the effective sample size with the verdict's threshold
(headrace/common/metrics/thresholds.py). For numerics, the gap between engine and learner on fresh tokens, it only
warns: neither less staleness nor a lower learning rate makes the two agree. Checkpoints contain its state.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from headrace.common.config import RunConfig
from headrace.common.metrics.thresholds import (
    NUMERICS,
    SMOOTHED_STEPS,
    THRESHOLDS,
    TRAINED_KL,
    Threshold,
    has_exact_numerics,
    logprob_gap_threshold,
)

MIN_STEPS_BEYOND = SMOOTHED_STEPS // 2 + 1
"""The guard acts if this many of the last five steps, and thus their median, are beyond a threshold."""
CALM_STEPS = 20
"""Number of consecutive steps below every warning threshold after which the guard goes back by one level."""
STALENESS_DIVISOR, LOWEST_STALENESS = 4, 1
NUM_LR_LEVELS = 3
WATCHED_METRICS = (TRAINED_KL.name, "ess")


class GuardState(msgspec.Struct, frozen=True):
    """Stored in checkpoints."""

    level: int = msgspec.field(default=0, name="notch")
    """The index in `tightening_levels`; 0: the settings as ordered. Checkpoints call it `notch`."""
    is_warned: bool = False
    warnings: tuple[bool, ...] = ()
    """For each of the last steps, whether it was beyond a warning threshold; the newest last."""
    alarms: tuple[bool, ...] = ()
    """The same for alarm thresholds, since the guard last tightened."""
    calm_steps: int = 0
    gaps: tuple[bool, ...] = ()
    """For each of the last steps with fresh tokens, whether the numerics' gap was beyond its warning threshold."""
    is_warned_of_numerics: bool = False


class Decision(NamedTuple):
    state: GuardState
    kind: Literal["warn", "tighten", "loosen"] | None = None
    reason: str = ""


def decide(state: GuardState, row: Mapping[str, Any], config: RunConfig) -> Decision:
    """The decision after a step with the metrics `row`; `config` is the run's before the guard's changes."""
    decision = _check_drift(state, row, config)
    return _check_numerics(decision, row, config)


def _check_drift(state: GuardState, row: Mapping[str, Any], config: RunConfig) -> Decision:
    values = {**row, TRAINED_KL.name: _trained_kl(row)}
    found = [
        (threshold, float(values[threshold.name]))
        for threshold in (TRAINED_KL, *THRESHOLDS)
        if threshold.name in WATCHED_METRICS and values.get(threshold.name) is not None
    ]
    alarming = [_describe(one, value, one.alarm) for one, value in found if one.is_beyond(value, one.alarm)]
    worrying = [_describe(one, value, one.warn) for one, value in found if one.is_beyond(value, one.warn)]
    alarms = (*state.alarms, bool(alarming))[-SMOOTHED_STEPS:]
    warnings = (*state.warnings, bool(worrying))[-SMOOTHED_STEPS:]
    calm = 0 if worrying else state.calm_steps + 1
    deepest = len(tightening_levels(config)) - 1 if config.actor.divergence_guard == "act" else 0
    level = min(state.level, deepest)

    def next_state(level: int, is_warned: bool, alarms: tuple[bool, ...] = (), calm: int = 0) -> GuardState:
        return replace(state, level=level, is_warned=is_warned, warnings=warnings, alarms=alarms, calm_steps=calm)

    if alarming and sum(alarms) >= MIN_STEPS_BEYOND and level < deepest:
        return Decision(next_state(level + 1, True), "tighten", "; ".join(alarming))
    if worrying and sum(warnings) >= MIN_STEPS_BEYOND and not state.is_warned:
        return Decision(next_state(level, True, alarms), "warn", "; ".join(worrying))
    if calm >= CALM_STEPS and state.is_warned:
        return Decision(next_state(max(0, level - 1), level > 1), "loosen", f"{calm} calm steps")
    return Decision(next_state(level, state.is_warned, alarms, calm))


def _check_numerics(decision: Decision, row: Mapping[str, Any], config: RunConfig) -> Decision:
    """Warns once of a lasting gap, and again if it returns after it was gone; a decision about drift has precedence."""
    threshold = logprob_gap_threshold(has_exact_numerics(config.model.dtype, config.generation.engine.swap_mode))
    value = row.get(threshold.name)
    if value is None:
        return decision
    state, is_beyond = decision.state, threshold.is_beyond(float(value), threshold.warn)
    gaps = (*state.gaps, is_beyond)[-SMOOTHED_STEPS:]
    is_due = is_beyond and sum(gaps) >= MIN_STEPS_BEYOND and not state.is_warned_of_numerics and decision.kind is None
    is_warned = is_due or (state.is_warned_of_numerics and any(gaps))
    state = replace(state, gaps=gaps, is_warned_of_numerics=is_warned)
    if is_due:
        return Decision(state, "warn", f"{_describe(threshold, float(value), threshold.warn)}: {NUMERICS}")
    return decision._replace(state=state)


def tightening_levels(config: RunConfig) -> list[tuple[int, float]]:
    """`max_staleness` and `lr` of each level; level 0 has those of `config`."""
    staleness, lr = config.learner.max_staleness, config.optimizer.lr
    levels = [(staleness, lr)]
    while staleness > LOWEST_STALENESS:
        staleness = max(LOWEST_STALENESS, staleness // STALENESS_DIVISOR)
        levels.append((staleness, lr))
    return levels + [(staleness, lr / 2**halvings) for halvings in range(1, NUM_LR_LEVELS + 1)]


def apply_guard(config: RunConfig, state: GuardState) -> RunConfig:
    """`config` with the settings of the guard's level."""
    if state.level == 0 or config.actor.divergence_guard != "act":
        return config
    levels = tightening_levels(config)
    staleness, lr = levels[min(state.level, len(levels) - 1)]
    learner = config.learner.model_copy(update={"max_staleness": staleness})
    optimizer = config.optimizer.model_copy(update={"lr": lr})
    return config.model_copy(update={"learner": learner, "optimizer": optimizer})


def describe_overrides(ordered: RunConfig, config: RunConfig) -> str:
    """The settings that the guard has changed from `ordered`, as text; empty if there are none."""
    pairs = {
        "max_staleness": (config.learner.max_staleness, ordered.learner.max_staleness),
        "lr": (config.optimizer.lr, ordered.optimizer.lr),
    }
    return ", ".join(f"{name} {now:g} instead of {then:g}" for name, (now, then) in pairs.items() if now != then)


def _trained_kl(row: Mapping[str, Any]) -> float | None:
    """KL(behaviour ‖ proximal) times the share of tokens that the behaviour clip keeps: the tokens that it drops have
    drifted furthest and do no harm."""
    kl = row.get("kl_behaviour_proximal")
    return None if kl is None else float(kl * (1 - row.get("behaviour_clip_fraction", 0.0)))


def _describe(threshold: Threshold, value: float, limit: float) -> str:
    return f"{threshold.name} {value:.3g}, {'below' if threshold.is_floor else 'above'} {limit:g}"
