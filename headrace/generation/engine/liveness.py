"""Detects by signs of life and probes that an engine has been silent for too long.

A sign of life is any reply that SGLang cannot give without its scheduler: completions, loaded weights, or the token of
a probe. A probe is sent after a time without other signs. An engine on a CPU that is computing gets `busy_timeout_s`.
Others do not show whether they compute; they are not probed while they load or hash weights, which has its own
deadline.
"""

import asyncio
import time

from headrace.generation.engine.client import Engine
from headrace.generation.engine.server import EngineServer

PROBE_AFTER = 0.25
"""A probe is sent after this share of the timeout without a sign of life."""
MIN_PROBE_S = 5.0
PROBE_PAUSE_S = 1.0
BUSY_SHARE = 0.2
"""An engine is busy if it uses at least this share of one core during a probe; a long prefill uses more."""


class EngineLiveness:
    """Watches one engine; `server` is None for an external one. Call `begin` whenever the engine begins to serve."""

    def __init__(self, engine: Engine, server: EngineServer | None, timeout_s: float, busy_timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.num_failed_probes = 0
        self._engine = engine
        self._server = server
        self._busy_timeout_s = busy_timeout_s
        self._began_at = time.monotonic()
        self._is_probe_requested = False
        self._next_probe_at = 0.0

    def begin(self) -> None:
        self._began_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life, or since the engine began to serve."""
        return time.monotonic() - max(self._engine.last_heard_at, self._began_at)

    @property
    def is_overdue(self) -> bool:
        """Whether the engine has been silent for so long that it should have answered a probe."""
        return not self._engine.is_loading and self.silent_s > self.timeout_s / 2

    def request_probe(self) -> None:
        """Has the next `is_silent` send a probe, even if the engine has just given a sign of life."""
        self._is_probe_requested = True

    async def is_silent(self) -> bool:
        """Sends a probe if one is due; returns whether the engine has been silent for too long."""
        is_due = self._is_probe_requested or self.silent_s > PROBE_AFTER * self.timeout_s
        return is_due and not self._is_loading and time.monotonic() >= self._next_probe_at and await self._probe()

    async def wait_until_responsive(self) -> None:
        while not await self._engine.health(self.timeout_s):
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _probe(self) -> bool:
        began_at, busy_s = time.monotonic(), self._busy_s()
        probe_s = min(max(self.timeout_s - self.silent_s, MIN_PROBE_S), self.timeout_s)
        if await self._engine.health(probe_s):
            self._is_probe_requested = False
            return False
        now = time.monotonic()
        if now - began_at > probe_s + MIN_PROBE_S:
            return False  # this process was stopped meanwhile
        self.num_failed_probes += 1
        self._next_probe_at = now + PROBE_PAUSE_S
        is_busy = (self._busy_s() or 0.0) - (busy_s or 0.0) > BUSY_SHARE * max(now - began_at, 1.0)
        timeout_s = max(self.timeout_s, self._busy_timeout_s) if is_busy else self.timeout_s
        return self.silent_s >= timeout_s and not self._is_loading

    @property
    def _is_loading(self) -> bool:
        """Whether the engine loads or hashes weights and does not show whether it computes."""
        return self._engine.is_loading and self._busy_s() is None

    def _busy_s(self) -> float | None:
        return self._server.busy_s() if self._server is not None else None
