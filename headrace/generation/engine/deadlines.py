"""Deadlines for an engine's completions of a ticket.

A deadline measures progress, because the engine's speed is not known. It starts again whenever the engine answers any
ticket, because a request may have to wait for others to end before it starts. It grows with the maximum number of new
tokens. It has an upper limit, so that a request that the engine has lost is detected however busy the engine is.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

TOKENS_PER_TIMEOUT = 4096
"""Requests for more new tokens get proportionally more time."""
MAX_ALLOWANCES = 4
"""A request fails after this many allowances, even if other tickets are answered."""


@dataclass(eq=False)
class _Deadline:
    timeout: asyncio.Timeout
    allowance_s: float
    last_at: float


class CompletionDeadlines:
    """Deadlines of one engine's tickets. `timeout_s` is the allowance for up to `TOKENS_PER_TIMEOUT` new tokens."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: set[_Deadline] = set()

    def allowance_s(self, max_new_tokens: int) -> float:
        return self._timeout_s * max(1.0, max_new_tokens / TOKENS_PER_TIMEOUT)

    @contextlib.asynccontextmanager
    async def enforce(self, max_new_tokens: int) -> AsyncIterator[None]:
        """Raises `TimeoutError` when the block takes too long. An end without an error counts as an answer."""
        loop, allowance_s = asyncio.get_running_loop(), self.allowance_s(max_new_tokens)
        async with asyncio.timeout(allowance_s) as timeout:
            deadline = _Deadline(timeout, allowance_s, loop.time() + MAX_ALLOWANCES * allowance_s)
            self._waiting.add(deadline)
            try:
                yield
            finally:
                self._waiting.discard(deadline)
        for other in self._waiting:
            if not other.timeout.expired():
                other.timeout.reschedule(min(loop.time() + other.allowance_s, other.last_at))
