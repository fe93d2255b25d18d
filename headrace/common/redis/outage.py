"""Outages of Redis: which errors are worth waiting for, and one outage with one deadline for all of a client."""

import re
import ssl
import threading
from collections import Counter
from collections.abc import Callable

import redis
from redis.exceptions import AuthorizationError, MasterDownError, TryAgainError

from headrace.common.process.waiting import Reason, Waits

OUTAGE_GAP_S = 30.0
"""A failure this long after the last one, with no call waiting in between, begins a new outage."""

_NOT_RETRIED = (redis.AuthenticationError, AuthorizationError, ssl.SSLCertVerificationError)
_REFUSAL_CLASSES = (redis.OutOfMemoryError, redis.ReadOnlyError, MasterDownError, TryAgainError)
_REFUSAL_PREFIXES = ("MISCONF ", "NOREPLICAS ", "BUSY ", "UNBLOCKED ")
"""Refusals for which redis-py has no class."""
_IN_PIPELINE = re.compile(r"^Command # .* of pipeline caused error: (?:\(['\"])?(.*?)(?:['\"],\))?$", re.DOTALL)
"""The text that redis-py puts around the server's message."""


def server_message(error: BaseException) -> str:
    """The server's message, without the payload of a pipeline's command that redis-py adds."""
    return "loading its data" if isinstance(error, redis.BusyLoadingError) else _IN_PIPELINE.sub(r"\1", str(error))


def reason_to_wait(error: BaseException) -> Reason | None:
    """The reason to wait after this error; None if waiting cannot help."""
    if any(isinstance(link, _NOT_RETRIED) for link in (error, error.__cause__, error.__context__)):
        return None  # redis-py wraps some of them in its ConnectionError
    if isinstance(error, _REFUSAL_CLASSES) or (
        isinstance(error, redis.ResponseError) and server_message(error).startswith(_REFUSAL_PREFIXES)
    ):
        return Reason.REDIS_REFUSING
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return Reason.REDIS_UNREACHABLE
    return None


class Outage:
    """An outage between one client and its server, with one deadline for all connections, threads and tasks.

    It begins with a failure and ends when the failed operation (a command, a connect) succeeds or gets an error reply.
    """

    def __init__(
        self, server: str, password: str, waits: Waits, deadline_s: float, is_stopping: Callable[[], bool]
    ) -> None:
        self.server = server
        self.waits = waits
        self.deadline_s = deadline_s
        self.is_stopping = is_stopping
        self._password = password
        self._lock = threading.Lock()
        self._began: float | None = None
        self._last_failure = 0.0
        self._num_waiting: Counter[Reason] = Counter()

    def note_failure(self, now: float) -> float:
        """Notes a failure; returns when its outage began, on the monotonic clock."""
        with self._lock:
            is_forgotten = not self._num_waiting.total() and now - self._last_failure > OUTAGE_GAP_S
            if self._began is None or is_forgotten:
                self._began = now
            self._last_failure = now
            return self._began

    def enter(self, reason: Reason) -> None:
        with self._lock:
            self._num_waiting[reason] += 1

    def leave(self, reason: Reason, is_answered: bool) -> None:
        with self._lock:
            self._num_waiting[reason] -= 1
            if is_answered:
                self._began = None
            if is_answered or not self._num_waiting[reason]:  # calls that still wait note it again
                self.waits.end(reason)

    def hide_password(self, error: BaseException) -> None:
        """Removes the password from an error: a server without the command HELLO repeats HELLO's arguments."""
        for link in (error, error.__cause__, error.__context__):
            if link is not None and self._password:
                link.args = tuple(
                    part.replace(self._password, "***") if isinstance(part, str) else part for part in link.args
                )
