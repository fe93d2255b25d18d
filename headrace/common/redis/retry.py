"""What happens to a command while Redis is away or refuses: one outage with one deadline for all of a client.

A command that fails on a broken connection, or that the server refuses for the time being, is sent again with growing
pauses, on a new connection, until the outage has lasted its deadline; then the error is raised.
"""

import asyncio
import contextlib
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import redis
from redis.asyncio.retry import Retry as RedisAsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthorizationError, MasterDownError, TryAgainError
from redis.retry import Retry as RedisRetry

from headrace.common.process.waiting import Reason, Waits

OUTAGE_GAP_S = 30.0
"""A failure this long after the last one, with nobody waiting in between, begins another outage."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0

_FINAL = (redis.AuthenticationError, AuthorizationError, ssl.SSLCertVerificationError)
_REFUSALS = (redis.OutOfMemoryError, redis.ReadOnlyError, MasterDownError, TryAgainError)
_REFUSED = ("MISCONF ", "NOREPLICAS ", "BUSY ", "UNBLOCKED ")
"""Refusals that have no class of their own."""
_IN_PIPELINE = re.compile(r"^Command # .* of pipeline caused error: (?:\(['\"])?(.*?)(?:['\"],\))?$", re.DOTALL)
"""What redis-py puts around the server's words."""

T = TypeVar("T")


def server_message(error: BaseException) -> str:
    """The server's own words where it has spoken: without the payload of a pipeline's command."""
    return "loading its data" if isinstance(error, redis.BusyLoadingError) else _IN_PIPELINE.sub(r"\1", str(error))


def reason_to_wait(error: BaseException) -> Reason | None:
    """What is worth waiting for after this error; None if time does not mend it."""
    if any(isinstance(link, _FINAL) for link in (error, error.__cause__, error.__context__)):
        return None  # redis-py wraps some of them in its ConnectionError
    if isinstance(error, _REFUSALS) or (
        isinstance(error, redis.ResponseError) and server_message(error).startswith(_REFUSED)
    ):
        return Reason.REDIS_REFUSING
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return Reason.REDIS_UNREACHABLE
    return None


class Outage:
    """What is wrong between one client and its server: one deadline for all its connections, threads and tasks.

    It begins with a failure and ends when what had failed succeeds (a command, a connect) or is answered with a no.
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
        """Notes a failure; returns when its outage began."""
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
            if is_answered or not self._num_waiting[reason]:  # others who still wait will say so again
                self.waits.end(reason)

    def hide_password(self, error: BaseException) -> None:
        """A server that does not know a command repeats its arguments, and HELLO has the password among them."""
        for link in (error, error.__cause__, error.__context__):
            if link is not None and self._password:
                link.args = tuple(
                    part.replace(self._password, "***") if isinstance(part, str) else part for part in link.args
                )


class _RetriedCall:
    """One command's way through an outage, as a context: it leaves the wait however it ends."""

    def __init__(self, outage: Outage) -> None:
        self._outage = outage
        self._reason: Reason | None = None
        self._first_failure: float | None = None
        self.num_failures = 0
        self.pause_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(is_answered=False)

    def answered(self) -> None:
        self._leave(is_answered=True)

    def _leave(self, is_answered: bool) -> None:
        if self._reason is not None:
            self._outage.leave(self._reason, is_answered)
            self._reason = None

    def should_retry(self, error: BaseException) -> bool:
        """After `pause_s`. Shows the wait."""
        outage, now = self._outage, time.monotonic()
        outage.hide_password(error)
        reason = reason_to_wait(error)
        if reason is None:
            self.answered()  # with a no
            return False
        self._first_failure = now if self._first_failure is None else self._first_failure
        left_s = outage.deadline_s - (now - min(outage.note_failure(now), self._first_failure))
        if left_s <= 0 or outage.is_stopping():
            return False
        if reason is not self._reason:
            self._leave(is_answered=False)
            self._reason = reason
            outage.enter(reason)
        outage.waits.note(reason, f"{outage.server}: {server_message(error)}", outage.deadline_s)
        self.pause_s = min(FIRST_PAUSE_S * 2 ** min(self.num_failures, 10), MAX_PAUSE_S, left_s)
        self.num_failures += 1
        return True


class _SharedOutage:
    """Mixed into redis-py's Retry: each connection has its own copy, and all copies one outage. redis-py uses it for a
    command, for the handshake, and within a command for its connect."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(NoBackoff(), -1)  # type: ignore[call-arg]  # of Retry; it uses neither
        self._outage = outage

    def __deepcopy__(self, memo: object) -> Self:
        return type(self)(self._outage)


class SyncRetry(_SharedOutage, RedisRetry):  # type: ignore[misc]
    def call_with_retry(
        self, do: Callable[[], T], fail: Callable[..., object], _: object = None, with_failure_count: bool = False
    ) -> T:
        with _RetriedCall(self._outage) as call:
            while True:
                try:
                    result = do()
                except (redis.RedisError, OSError) as error:
                    if not call.should_retry(error):
                        raise
                    fail(error, call.num_failures) if with_failure_count else fail(error)  # disconnects
                    time.sleep(call.pause_s)
                    if self._outage.is_stopping():
                        raise
                else:
                    call.answered()
                    return result


class AsyncRetry(_SharedOutage, RedisAsyncRetry):  # type: ignore[misc]
    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Awaitable[object]],
        _: object = None,
        with_failure_count: bool = False,
    ) -> T:
        with _RetriedCall(self._outage) as call:
            while True:
                try:
                    result = await do()
                except (redis.RedisError, OSError) as error:
                    if not call.should_retry(error):
                        raise
                    with contextlib.suppress(redis.TimeoutError):  # of the disconnect itself; it is closed anyway
                        await (fail(error, call.num_failures) if with_failure_count else fail(error))
                    await asyncio.sleep(call.pause_s)
                else:
                    call.answered()
                    return result


class CancellableConnection:
    """Mixed into a connection of redis-py. It sends inside `asyncio.wait_for`, and until Python 3.12 that forgets a
    cancellation which comes just as the sending is done, so that the command would be waited for to its end."""

    async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        num_cancellations = task.cancelling()
        try:
            await super().send_packed_command(*arguments, **options)  # type: ignore[misc]
        finally:
            if task.cancelling() > num_cancellations:
                await self.disconnect(nowait=True)  # type: ignore[attr-defined]  # its answer is not for the next
                raise asyncio.CancelledError
