"""How long an engine is given for a ticket's completions.

A deadline is about progress, not about a speed that nobody knows: it begins anew whenever the engine answers any
ticket, for a request may have to wait for others to end before it is begun; it grows with the tokens that a completion
may have; and however busy the engine is, a request that it has lost is found.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

TOKENS_PER_TIMEOUT = 4096
"""Completions that may be longer are given more time, in proportion."""
MAX_ALLOWANCES = 4
"""After so many a request is given up, whatever else is answered."""


@dataclass(eq=False)
class _Deadline:
    timeout: asyncio.Timeout
    allowance_s: float
    last_at: float


class CompletionDeadlines:
    """Of the tickets in one engine. `timeout_s` is what one of at most `TOKENS_PER_TIMEOUT` new tokens is given."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: set[_Deadline] = set()

    def allowance_s(self, max_new_tokens: int) -> float:
        return self._timeout_s * max(1.0, max_new_tokens / TOKENS_PER_TIMEOUT)

    @contextlib.asynccontextmanager
    async def enforce(self, max_new_tokens: int) -> AsyncIterator[None]:
        """Raises `TimeoutError` when the block has taken too long; its end in any other way than by an error is an
        answer."""
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
