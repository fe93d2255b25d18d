"""Acts before a run is lost: from what a step says of itself to a tighter run, and back. Pure.

Beyond a warning it warns; beyond an alarm it goes down a ladder, notch by notch: first `learner.max_staleness` to a
quarter, down to 1, then `optimizer.lr` to a half. A notch is taken back after a long calm. Nothing happens for one odd
batch. It watches the KL of what is trained, by an alarm that comes early (docs/staleness.md), and the effective sample
size by the verdict's threshold (headrace/common/metrics/thresholds.py). Of numerics, how far engine and learner
disagree on fresh tokens, it only warns: neither less staleness nor a lower rate makes two engines agree. The state is a
checkpoint's.
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
    are_exact,
    numeric_gap,
)

PATIENCE_STEPS = SMOOTHED_STEPS // 2 + 1
"""Of the last five beyond a threshold before anything happens: then their median is beyond it."""
CALM_STEPS = 20
"""In a row without anything to warn of before a notch is taken back."""
STALENESS_DIVISOR, LOWEST_STALENESS = 4, 1
NUM_LR_NOTCHES = 3
WATCHED = (TRAINED_KL.name, "ess")


class GuardState(msgspec.Struct, frozen=True):
    notch: int = 0
    """Down the ladder; 0: as ordered."""
    is_warned: bool = False
    warnings: tuple[bool, ...] = ()
    """Of the last steps, whether each was beyond a warning; the newest last."""
    alarms: tuple[bool, ...] = ()
    """As `warnings`, since the guard last tightened."""
    calm_steps: int = 0
    gaps: tuple[bool, ...] = ()
    """Of the last steps with fresh tokens, whether each one's numerics were beyond their warning; the newest last."""
    is_warned_of_numerics: bool = False


class Decision(NamedTuple):
    state: GuardState
    kind: Literal["warn", "tighten", "loosen"] | None = None
    reason: str = ""


def decide(state: GuardState, row: Mapping[str, Any], config: RunConfig) -> Decision:
    """After a step with the metrics `row`; `config` is the run's as ordered, before the guard."""
    decision = _follow_drift(state, row, config)
    return _watch_numerics(decision, row, config)


def _follow_drift(state: GuardState, row: Mapping[str, Any], config: RunConfig) -> Decision:
    values = {**row, TRAINED_KL.name: _trained_kl(row)}
    found = [
        (threshold, float(values[threshold.name]))
        for threshold in (TRAINED_KL, *THRESHOLDS)
        if threshold.name in WATCHED and values.get(threshold.name) is not None
    ]
    alarming = [_told(one, value, one.alarm) for one, value in found if one.is_beyond(value, one.alarm)]
    worrying = [_told(one, value, one.warn) for one, value in found if one.is_beyond(value, one.warn)]
    alarms = (*state.alarms, bool(alarming))[-SMOOTHED_STEPS:]
    warnings = (*state.warnings, bool(worrying))[-SMOOTHED_STEPS:]
    calm = 0 if worrying else state.calm_steps + 1
    deepest = len(ladder(config)) - 1 if config.actor.divergence_guard == "act" else 0
    notch = min(state.notch, deepest)

    def moved(notch: int, is_warned: bool, alarms: tuple[bool, ...] = (), calm: int = 0) -> GuardState:
        return replace(state, notch=notch, is_warned=is_warned, warnings=warnings, alarms=alarms, calm_steps=calm)

    if alarming and sum(alarms) >= PATIENCE_STEPS and notch < deepest:
        return Decision(moved(notch + 1, True), "tighten", "; ".join(alarming))
    if worrying and sum(warnings) >= PATIENCE_STEPS and not state.is_warned:
        return Decision(moved(notch, True, alarms), "warn", "; ".join(worrying))
    if calm >= CALM_STEPS and state.is_warned:
        return Decision(moved(max(0, notch - 1), notch > 1), "loosen", f"{calm} calm steps")
    return Decision(moved(notch, state.is_warned, alarms, calm))


def _watch_numerics(decision: Decision, row: Mapping[str, Any], config: RunConfig) -> Decision:
    """Warns once of a gap that lasts, and again if it comes back after it was gone; never before or instead of what
    drift asks for."""
    threshold = numeric_gap(are_exact(config.model.dtype, config.generation.engine.swap_mode))
    value = row.get(threshold.name)
    if value is None:
        return decision
    state, is_beyond = decision.state, threshold.is_beyond(float(value), threshold.warn)
    gaps = (*state.gaps, is_beyond)[-SMOOTHED_STEPS:]
    is_due = is_beyond and sum(gaps) >= PATIENCE_STEPS and not state.is_warned_of_numerics and decision.kind is None
    is_warned = is_due or (state.is_warned_of_numerics and any(gaps))
    state = replace(state, gaps=gaps, is_warned_of_numerics=is_warned)
    if is_due:
        return Decision(state, "warn", f"{_told(threshold, float(value), threshold.warn)}: {NUMERICS}")
    return decision._replace(state=state)


def ladder(config: RunConfig) -> list[tuple[int, float]]:
    """max_staleness and lr of each notch, the first as in `config`."""
    staleness, lr = config.learner.max_staleness, config.optimizer.lr
    notches = [(staleness, lr)]
    while staleness > LOWEST_STALENESS:
        staleness = max(LOWEST_STALENESS, staleness // STALENESS_DIVISOR)
        notches.append((staleness, lr))
    return notches + [(staleness, lr / 2**halvings) for halvings in range(1, NUM_LR_NOTCHES + 1)]


def tightened(config: RunConfig, state: GuardState) -> RunConfig:
    """`config`, as ordered, as it counts at the guard's notch."""
    if state.notch == 0 or config.actor.divergence_guard != "act":
        return config
    notches = ladder(config)
    staleness, lr = notches[min(state.notch, len(notches) - 1)]
    learner = config.learner.model_copy(update={"max_staleness": staleness})
    optimizer = config.optimizer.model_copy(update={"lr": lr})
    return config.model_copy(update={"learner": learner, "optimizer": optimizer})


def held_back(ordered: RunConfig, config: RunConfig) -> str:
    """What the guard has made of what is ordered, for people; empty where nothing."""
    pairs = {
        "max_staleness": (config.learner.max_staleness, ordered.learner.max_staleness),
        "lr": (config.optimizer.lr, ordered.optimizer.lr),
    }
    return ", ".join(f"{name} {now:g} instead of {then:g}" for name, (now, then) in pairs.items() if now != then)


def _trained_kl(row: Mapping[str, Any]) -> float | None:
    """KL(behaviour ‖ proximal), by the share of tokens that the behaviour clip leaves to be trained: what it drops is
    farther off than the others and does no harm."""
    kl = row.get("kl_behaviour_proximal")
    return None if kl is None else float(kl * (1 - row.get("behaviour_clip_fraction", 0.0)))


def _told(threshold: Threshold, value: float, limit: float) -> str:
    return f"{threshold.name} {value:.3g}, {'below' if threshold.is_floor else 'above'} {limit:g}"
