"""Connections to Redis: one place for retries, deadlines and the check that it can be trusted to lose nothing.

A command that fails on a broken connection, or that the server refuses for the time being, is sent again with growing
pauses, on a new connection, until the outage has lasted the client's deadline; then the error is raised. `Waits` shows
the outage while it lasts. No error and no wait names the password. Every write of the project may therefore arrive
twice, and is written so that twice does no harm.
"""

import asyncio
import contextlib
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import AuthorizationError, MasterDownError, TryAgainError
from redis.retry import Retry

from common.waiting import Reason, Waits

RETRY_S = 30
"""The deadline of whoever starts, asks or tests."""
OUTAGE_DEADLINE_S = 300.0
"""The deadline of a running service."""
FORGOTTEN_AFTER_S = 30.0
"""A failure this long after the last one, with nobody waiting in between, begins another outage."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
_TIMEOUTS = {"socket_timeout": 10.0, "socket_connect_timeout": 5.0}
"""Ten times what a blocking read asks for: whoever is silent for longer is frozen."""

_FINAL = (redis.AuthenticationError, AuthorizationError, ssl.SSLCertVerificationError)
_REFUSALS = (redis.OutOfMemoryError, redis.ReadOnlyError, MasterDownError, TryAgainError)
_REFUSED = ("MISCONF ", "NOREPLICAS ", "BUSY ", "UNBLOCKED ")
"""Refusals that have no class of their own."""
_IN_PIPELINE = re.compile(r"^Command # .* of pipeline caused error: (?:\(['\"])?(.*?)(?:['\"],\))?$", re.DOTALL)
"""What redis-py puts around the server's words."""

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""What "nothing lost" means under `kill -9` of the server."""

T = TypeVar("T")


def connect(
    url: str,
    waits: Waits | None = None,
    *,
    deadline_s: float = RETRY_S,
    is_stopping: Callable[[], bool] = lambda: False,
) -> redis.Redis:
    """For code that runs in threads. Does not connect yet. Nothing is retried once `is_stopping`."""
    retry = _Retry(_outage(url, waits, deadline_s, is_stopping))
    return redis.Redis.from_url(url, retry=retry, **_TIMEOUTS)


def connect_async(url: str, waits: Waits | None = None, *, deadline_s: float = RETRY_S) -> redis.asyncio.Redis:
    """For code that runs in an event loop. Does not connect yet. A task that is cancelled ends at once."""
    retry = _AsyncRetry(_outage(url, waits, deadline_s, lambda: False))
    client = redis.asyncio.Redis.from_url(url, retry=retry, **_TIMEOUTS)
    pool = client.connection_pool
    pool.connection_class = type("Connection", (_Cancellable, pool.connection_class), {})
    return client


def _outage(url: str, waits: Waits | None, deadline_s: float, is_stopping: Callable[[], bool]) -> "_Outage":
    try:
        options = parse_url(url)
    except ValueError:  # its text may hold a part of the password
        raise ValueError(
            "the URL of Redis cannot be read: expected redis://:password@host:port/db, rediss:// or unix:///path,"
            " with the special characters of the password percent-encoded"
        ) from None
    server = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return _Outage(server, options.get("password", ""), waits or Waits(), deadline_s, is_stopping)


def words_of(error: BaseException) -> str:
    """The server's own words where it has spoken: without the payload of a pipeline's command."""
    return "loading its data" if isinstance(error, redis.BusyLoadingError) else _IN_PIPELINE.sub(r"\1", str(error))


def reason_to_wait(error: BaseException) -> Reason | None:
    """What is worth waiting for after this error; None if time does not mend it."""
    if any(isinstance(link, _FINAL) for link in (error, error.__cause__, error.__context__)):
        return None  # redis-py wraps some of them in its ConnectionError
    if isinstance(error, _REFUSALS) or (
        isinstance(error, redis.ResponseError) and words_of(error).startswith(_REFUSED)
    ):
        return Reason.REDIS_REFUSES
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return Reason.REDIS_UNREACHABLE
    return None


class _Outage:
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

    def failed(self, now: float) -> float:
        """Notes a failure; returns when its outage began."""
        with self._lock:
            is_forgotten = not self._num_waiting.total() and now - self._last_failure > FORGOTTEN_AFTER_S
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
                self.waits.over(reason)

    def hide_password(self, error: BaseException) -> None:
        """A server that does not know a command repeats its arguments, and HELLO has the password among them."""
        for link in (error, error.__cause__, error.__context__):
            if link is not None and self._password:
                link.args = tuple(
                    part.replace(self._password, "***") if isinstance(part, str) else part for part in link.args
                )


class _Call:
    """One command's way through an outage, as a context: it leaves the wait however it ends."""

    def __init__(self, outage: _Outage) -> None:
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

    def is_worth_another_try(self, error: BaseException) -> bool:
        """After `pause_s`. Shows the wait."""
        outage, now = self._outage, time.monotonic()
        outage.hide_password(error)
        reason = reason_to_wait(error)
        if reason is None:
            self.answered()  # with a no
            return False
        self._first_failure = now if self._first_failure is None else self._first_failure
        left_s = outage.deadline_s - (now - min(outage.failed(now), self._first_failure))
        if left_s <= 0 or outage.is_stopping():
            return False
        if reason is not self._reason:
            self._leave(is_answered=False)
            self._reason = reason
            outage.enter(reason)
        outage.waits.waiting(reason, f"{outage.server}: {words_of(error)}", outage.deadline_s)
        self.pause_s = min(FIRST_PAUSE_S * 2 ** min(self.num_failures, 10), LONGEST_PAUSE_S, left_s)
        self.num_failures += 1
        return True


class _Shared:
    """Mixed into redis-py's Retry: each connection has its own copy, and all copies one outage. redis-py uses it for a
    command, for the handshake, and within a command for its connect."""

    def __init__(self, outage: _Outage) -> None:
        super().__init__(NoBackoff(), -1)  # type: ignore[call-arg]  # of Retry; it uses neither
        self._outage = outage

    def __deepcopy__(self, memo: object) -> Self:
        return type(self)(self._outage)


class _Retry(_Shared, Retry):  # type: ignore[misc]
    def call_with_retry(
        self, do: Callable[[], T], fail: Callable[..., object], _: object = None, with_failure_count: bool = False
    ) -> T:
        with _Call(self._outage) as call:
            while True:
                try:
                    result = do()
                except (redis.RedisError, OSError) as error:
                    if not call.is_worth_another_try(error):
                        raise
                    fail(error, call.num_failures) if with_failure_count else fail(error)  # disconnects
                    time.sleep(call.pause_s)
                    if self._outage.is_stopping():
                        raise
                else:
                    call.answered()
                    return result


class _AsyncRetry(_Shared, AsyncRetry):  # type: ignore[misc]
    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Awaitable[object]],
        _: object = None,
        with_failure_count: bool = False,
    ) -> T:
        with _Call(self._outage) as call:
            while True:
                try:
                    result = await do()
                except (redis.RedisError, OSError) as error:
                    if not call.is_worth_another_try(error):
                        raise
                    with contextlib.suppress(redis.TimeoutError):  # of the disconnect itself; it is closed anyway
                        await (fail(error, call.num_failures) if with_failure_count else fail(error))
                    await asyncio.sleep(call.pause_s)
                else:
                    call.answered()
                    return result


class _Cancellable:
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


def durability_problem(client: redis.Redis) -> str | None:
    """What this server would lose, and the setting that mends it; None if nothing."""
    try:
        found = {key: client.config_get(key).get(key) for key in DURABLE}
    except redis.ResponseError:
        return "its CONFIG cannot be read, so that nobody knows whether it keeps what it is given"
    wrong = [f"{key} is {found[key]!r}, expected {wanted!r}" for key, wanted in DURABLE.items() if found[key] != wanted]
    return "; ".join(wrong) or None


def entries_of(reply: Any) -> Iterator[tuple[str, bytes, dict[bytes, bytes]]]:
    """Stream, entry id and fields of everything that XREADGROUP answered, in either protocol of Redis.

    An entry that was deleted while it was pending comes without fields.
    """
    for stream, rows in reply.items() if isinstance(reply, dict) else reply or []:
        is_wrapped = rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], tuple)  # RESP3
        for entry_id, fields in rows[0] if is_wrapped else rows:
            yield stream.decode(), entry_id, fields or {}
