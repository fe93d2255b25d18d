"""What a process is waiting for: a typed reason, since when, and when it gives up.

Whoever waits says so here again and again while it waits; `/status` shows what stands here, and the log tells of a
wait that lasts, more and more rarely, and of its end. Safe to use from any thread.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FIRST_LOGGED_AFTER_S = 5.0
_log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Each reads on after "12 s: ..."."""

    REDIS_UNREACHABLE = "Redis unreachable"
    REDIS_REFUSES = "Redis refuses writes"
    NO_REPLICA = "no live replica"
    STARVED = "starved"
    EVALUATING = "waiting for an evaluation"
    CHECKPOINT = "the checkpoint cannot be written"
    CHECKPOINTING = "a checkpoint is being written"
    PUBLISHING = "the version before is still being published"
    VERSION = "the weights cannot be written"
    ENGINE_STARTING = "the engine is starting"
    ENGINE_SILENT = "the engine does not answer"
    WEIGHTS = "weights"
    REWARDS = "rewards fail"
    NO_TICKETS = "no tickets"
    PAUSED = "paused"


@dataclass
class Wait:
    reason: Reason
    detail: str
    deadline_s: float | None
    """Seconds after its begin at which whoever waits gives up; None: a person decides."""
    started: float
    logged_s: float = 0.0
    """How long it had lasted when the log last told of it."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class Waits:
    """The waits of one process, one for each reason."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waits: dict[Reason, Wait] = {}

    def waiting(self, reason: Reason, detail: str = "", deadline_s: float | None = None) -> float:
        """Says that the wait goes on (or begins); returns how many seconds it has lasted."""
        with self._lock:
            wait = self._waits.setdefault(reason, Wait(reason, detail, deadline_s, self._clock()))
            wait.detail, wait.deadline_s = detail, deadline_s
            lasted_s = self._clock() - wait.started
            if lasted_s >= max(FIRST_LOGGED_AFTER_S, 2 * wait.logged_s):
                wait.logged_s = lasted_s
                until = f", until {deadline_s:.0f} s" if deadline_s is not None else ""
                _log.warning("waiting for %.0f s%s: %s", lasted_s, until, wait)
            return lasted_s

    def over(self, reason: Reason) -> None:
        """The wait has ended; nothing if there was none."""
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

    def status(self) -> list[dict[str, Any]]:
        """For `/status`: reason, detail, for_s, deadline_s of each, the longest first."""
        with self._lock:
            waits = sorted(self._waits.values(), key=lambda wait: wait.started)
            return [
                {
                    "reason": wait.reason.value,
                    "detail": wait.detail,
                    "for_s": round(self._clock() - wait.started, 1),
                    "deadline_s": wait.deadline_s,
                }
                for wait in waits
            ]


def parse_waits(text: str) -> dict[str, float]:
    """Seconds by reason, of what `Waits.describe` says; what it has not said has none."""
    one_of = "|".join(re.escape(reason) for reason in Reason)
    found = re.finditer(rf"(?:^|; )({one_of})(?:: .*?)? for (\d{{1,9}}) s(?=; (?:{one_of})|$)", text, re.DOTALL)
    return {wait[1]: float(wait[2]) for wait in found}
