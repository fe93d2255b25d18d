"""Waits of a process: each has a typed reason with a stable code, a start and a deadline.

Code that waits calls `Waits.note` repeatedly while it waits. `/status` shows the present waits. The log reports a wait
that lasts, at growing intervals, and its end. Safe to use from any thread.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Any, Self

import msgspec

FIRST_LOGGED_AFTER_S = 5.0
_log = logging.getLogger(__name__)


@unique
class Reason(StrEnum):
    """A stable code for labels, fields and programs; people read `text`, which continues "12 s: ..."."""

    text: str

    REDIS_UNREACHABLE = "redis_unreachable", "Redis unreachable"
    REDIS_REFUSING = "redis_refusing", "Redis refuses writes"
    NO_REPLICA = "no_replica", "no live replica"
    WAITING_FOR_GROUPS = "waiting_for_groups", "not enough groups"
    WAITING_FOR_EVALUATION = "waiting_for_evaluation", "an evaluation is running"
    CHECKPOINT_FAILING = "checkpoint_failing", "the checkpoint cannot be written"
    WAITING_FOR_CHECKPOINT = "waiting_for_checkpoint", "a checkpoint is being written"
    WAITING_FOR_PUBLISH = "waiting_for_publish", "the previous version is still being published"
    PUBLISH_FAILING = "publish_failing", "the weights cannot be written"
    ENGINE_STARTING = "engine_starting", "the engine is starting"
    ENGINE_SILENT = "engine_silent", "the engine does not answer"
    WAITING_FOR_WEIGHTS = "waiting_for_weights", "weights"
    REWARDS_FAILING = "rewards_failing", "rewards fail"
    NO_TICKETS = "no_tickets", "no tickets"
    PAUSED = "paused", "paused"

    def __new__(cls, code: str, text: str) -> Self:
        reason = str.__new__(cls, code)
        reason._value_, reason.text = code, text
        return reason


@dataclass
class Wait:
    reason: Reason
    detail: str
    deadline_s: float | None
    """Seconds from its start until the code that waits gives up; None: until a person acts."""
    started: float
    logged_s: float = 0.0
    """How long it had lasted when the log last reported it."""

    def __str__(self) -> str:
        return f"{self.reason.text}: {self.detail}" if self.detail else self.reason.text


class Waits:
    """The waits of one process, one for each reason."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waits: dict[Reason, Wait] = {}

    def note(self, reason: Reason, detail: str = "", deadline_s: float | None = None) -> float:
        """Records that the wait begins or continues; returns how many seconds it has lasted."""
        with self._lock:
            wait = self._waits.setdefault(reason, Wait(reason, detail, deadline_s, self._clock()))
            wait.detail, wait.deadline_s = detail, deadline_s
            lasted_s = self._clock() - wait.started
            if lasted_s >= max(FIRST_LOGGED_AFTER_S, 2 * wait.logged_s):
                wait.logged_s = lasted_s
                until = f", until {deadline_s:.0f} s" if deadline_s is not None else ""
                _log.warning("waiting for %.0f s%s: %s", lasted_s, until, wait)
            return lasted_s

    def end(self, reason: Reason) -> None:
        """Records the end of the wait, if there is one."""
        with self._lock:
            wait = self._waits.pop(reason, None)
            if wait is not None and wait.logged_s:
                _log.warning("over after %.0f s: %s", self._clock() - wait.started, wait)

    def is_waiting(self, reason: Reason) -> bool:
        return reason in self._waits

    def describe(self) -> str:
        """One line of every wait, the longest first."""
        with self._lock:
            waits = sorted(self._waits.values(), key=lambda wait: wait.started)
            return "; ".join(f"{wait} for {self._clock() - wait.started:.0f} s" for wait in waits)

    def durations_s(self) -> dict[str, float]:
        """Seconds by reason, the longest first."""
        return {wait["reason"]: wait["for_s"] for wait in self.status()}

    def status(self) -> list[dict[str, Any]]:
        """For `/status`: reason, text, detail, for_s, deadline_s of each, the longest first."""
        with self._lock:
            waits = sorted(self._waits.values(), key=lambda wait: wait.started)
            return [
                {
                    "reason": wait.reason.value,
                    "text": wait.reason.text,
                    "detail": wait.detail,
                    "for_s": round(self._clock() - wait.started, 1),
                    "deadline_s": wait.deadline_s,
                }
                for wait in waits
            ]


def decode_waits(payload: str | bytes) -> dict[str, float]:
    """Seconds by reason, from the JSON of `Waits.durations_s`; unknown reasons and invalid values are left out."""
    try:
        waits = msgspec.json.decode(payload, type=dict[str, Any])
    except (ValueError, RecursionError):
        return {}
    known = set(Reason)
    return {reason: float(s) for reason, s in waits.items() if reason in known and isinstance(s, int | float)}
