"""Deadlines for an engine's completions of a ticket.

A deadline measures progress, because the engine's speed is not known. It starts again whenever the engine answers any
ticket, because a request may have to wait for others to end before it starts. It grows with the maximum number of new
tokens. It has an upper limit, so that a request that the engine has lost is detected however busy the engine is.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

TOKENS_PER_TIMEOUT = 4096
"""Requests for more new tokens get proportionally more time."""
MAX_ALLOWANCES = 4
"""A request fails after this many allowances, even if other tickets are answered."""


class CompletionDeadlines:
    """Deadlines of one engine's tickets and turns. `timeout_s` is the allowance for up to `TOKENS_PER_TIMEOUT` new
    tokens."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._answered_at = -math.inf
        """Time of the latest answer, by the event loop's clock."""

    def allowance_s(self, max_new_tokens: int) -> float:
        return self._timeout_s * max(1.0, max_new_tokens / TOKENS_PER_TIMEOUT)

    @contextlib.asynccontextmanager
    async def enforce(self, max_new_tokens: int) -> AsyncIterator[None]:
        """Raises `TimeoutError` when the block takes too long. An end without an error counts as an answer."""
        loop, allowance_s = asyncio.get_running_loop(), self.allowance_s(max_new_tokens)
        began_at = loop.time()
        check: asyncio.TimerHandle

        def expire_if_due() -> None:
            nonlocal check
            due_at = max(began_at, self._answered_at) + allowance_s
            due_at = min(due_at, began_at + MAX_ALLOWANCES * allowance_s)
            if loop.time() >= due_at:
                timeout.reschedule(loop.time())
            else:
                check = loop.call_at(due_at, expire_if_due)

        async with asyncio.timeout(None) as timeout:
            check = loop.call_at(began_at + allowance_s, expire_if_due)
            try:
                yield
            finally:
                check.cancel()
        self._answered_at = loop.time()
