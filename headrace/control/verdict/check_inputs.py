"""The input of all checks, and the result of one check. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.control.models.status import Check, Level

FINAL_PHASES = ("finished", "stopped", "starved", "failed")
RECENT_DEAD_WINDOW_S = 600.0


class ReplicaInput(NamedTuple):
    name: str
    state: str
    reason: str
    versions_behind: int
    waits: Mapping[str, float] = {}
    """Seconds by reason."""


@dataclass(frozen=True)
class CheckInputs:
    """The state of a run at one time; durations are in seconds and last until now."""

    phase: str = ""
    """The phase that the learner has written; empty if it has not written one yet."""
    reason: str = ""
    step: int = 0
    steps: int = 0
    is_paused: bool = False
    is_stopping: bool = False
    desired_replicas: int | None = None
    replicas: Sequence[ReplicaInput] = ()
    no_replica_s: float = 0.0
    """Time since a replica was last running."""
    learner_silent_s: float = 0.0
    """Time since the learner last answered; 0 if its address is unknown."""
    waiting_s: float = 0.0
    """How long the learner has had nothing to train on."""
    checkpoint_failing_s: float = 0.0
    redis_unavailable_s: float = 0.0
    num_recent_dead: int = 0
    """Number of dead letters within the last `RECENT_DEAD_WINDOW_S`."""
    dead_reason: str = ""
    """Reason of the latest dead letter."""
    held_back: str = ""
    """The settings that the learner's guard has tightened; empty if none."""
    settings_unapplied_s: float = 0.0
    """How long changed settings have waited for the learner."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The values of each watched metric in the last steps."""
    is_exact: bool = False
    """Whether learner and engine should compute the same log-probabilities up to rounding."""
    starvation_deadline_s: float = 1800.0
    max_staleness: int = 2


class CheckResult(NamedTuple):
    check: Check
    advice: str = ""


def check_result(
    name: str,
    level: Level,
    text: str,
    advice: str = "",
    value: float | None = None,
    warn: float | None = None,
    alarm: float | None = None,
) -> CheckResult:
    return CheckResult(Check(name=name, level=level, text=text, value=value, warn=warn, alarm=alarm), advice)


def without_duration(reason: str) -> str:
    """The reason without " for 12 s": the verdict shows its duration beside the sentence."""
    return re.sub(r" for \d+ s\b", "", reason).strip()
