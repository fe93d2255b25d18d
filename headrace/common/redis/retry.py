"""Retries of Redis commands, as retry policies of redis-py's clients.

A command that fails on a broken connection, or that the server refuses for now, is sent again with growing pauses, on a
new connection, until the outage has lasted its deadline; then the error is raised.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import redis
from redis.asyncio.retry import Retry as RedisAsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry as RedisRetry

from headrace.common.process.waiting import Reason
from headrace.common.redis.outage import Outage, reason_to_wait, server_message

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0

T = TypeVar("T")


class _RetriedCall:
    """One command during an outage, as a context manager: the wait ends however the command ends."""

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
        """Whether to try again after `pause_s` seconds; if so, notes the wait."""
        outage, now = self._outage, time.monotonic()
        outage.hide_password(error)
        reason = reason_to_wait(error)
        if reason is None:
            self.answered()  # with an error
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
    """Mixin for redis-py's Retry: each connection has its own copy, and all copies share one outage.

    redis-py uses it for a command, for the handshake, and within a command for its connect.
    """

    def __init__(self, outage: Outage) -> None:
        super().__init__(NoBackoff(), -1)  # type: ignore[call-arg]  # Retry's arguments; neither is used
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
                    with contextlib.suppress(
                        redis.TimeoutError
                    ):  # from the disconnect itself; the connection is closed anyway
                        await (fail(error, call.num_failures) if with_failure_count else fail(error))
                    await asyncio.sleep(call.pause_s)
                else:
                    call.answered()
                    return result


class CancellableConnection:
    """Mixin for redis-py's asynchronous connection: a cancelled command ends at once.

    redis-py sends inside `asyncio.wait_for`, which until Python 3.12 loses a cancellation that arrives just as sending
    completes; the command would then be awaited to its end.
    """

    async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        num_cancellations = task.cancelling()
        try:
            await super().send_packed_command(*arguments, **options)  # type: ignore[misc]
        finally:
            if task.cancelling() > num_cancellations:
                await self.disconnect(nowait=True)  # type: ignore[attr-defined]  # its reply must not go to the next command
                raise asyncio.CancelledError
