"""What a verdict is made of: facts of the run, and what has been found in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.control.models.status import Check, Level

FINAL_PHASES = ("finished", "stopped", "starved", "failed")


class ReplicaInput(NamedTuple):
    name: str
    state: str
    reason: str
    versions_behind: int


@dataclass(frozen=True)
class CheckInputs:
    """What the findings are made of; durations in seconds, up to now."""

    phase: str = ""
    """As the learner has written it; empty: none is there yet."""
    reason: str = ""
    step: int = 0
    steps: int = 0
    is_paused: bool = False
    is_stopping: bool = False
    desired_replicas: int | None = None
    replicas: Sequence[ReplicaInput] = ()
    no_replica_s: float = 0.0
    """Since a replica was last running."""
    learner_silent_s: float = 0.0
    """Since the learner last answered; 0 where it has told no address."""
    waiting_s: float = 0.0
    """For how long the learner has had nothing to train on."""
    checkpoint_failing_s: float = 0.0
    redis_unavailable_s: float = 0.0
    num_recent_dead: int = 0
    dead_reason: str = ""
    """Of the ticket that died last."""
    held_back: str = ""
    """What the learner's guard has tightened; empty: nothing."""
    settings_unapplied_s: float = 0.0
    """How long settings have waited for the learner."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """Of each watched metric the last steps' values."""
    is_exact: bool = False
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
    """Without how long it has lasted: a sentence that stands says since when beside it."""
    return re.sub(r" for \d+ s\b", "", reason).strip()
