"""Supervises a replica's engine: starts it, detects that it has died or hangs, and restarts it.

If an engine that the replica owns is silent for `liveness_timeout_s` (`liveness`), all its processes are killed and it
is started on the verified weights. If an external engine is silent, the replica reports it and waits until the engine
answers. Requests in an engine that dies or falls silent end with `EngineDown` before anything is killed, because the
requests are not at fault.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headrace.common.wire import Ticket
from headrace.generation.engine.client import Engine, EngineError, UnconfirmedWeights
from headrace.generation.engine.completions import Completion, SampledTurn, TurnRequest
from headrace.generation.engine.liveness import EngineLiveness
from headrace.generation.engine.reply_parsing import ParsedReply
from headrace.generation.engine.server import POLL_S, EngineServer

START_PAUSES_S = (2.0, 10.0)
"""Pauses before the second and the third start; after a third failure the replica gives up."""
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class EngineDown(RuntimeError):
    """During a request the engine died, fell silent, was restarted, or failed to confirm a swap."""


class EngineSupervisor:
    """Supervises one engine. `serving` is set while the engine may be used; `problem` says why it may not, and is empty
    during a normal start."""

    def __init__(
        self,
        engine: Engine,
        server: EngineServer | None,
        startup_weights: Callable[[], tuple[Path, int | None]],
        *,
        liveness_timeout_s: float,
        busy_timeout_s: float,
    ) -> None:
        self.engine = engine
        self.server = server
        """None for an external engine."""
        self.liveness = EngineLiveness(engine, server, liveness_timeout_s, busy_timeout_s)
        self.serving = asyncio.Event()
        self.problem = ""
        self.incarnation = 0
        """Counts the engine's starts; for an external engine, how often it began to answer."""
        self._startup_weights = startup_weights
        self._restart_reason = ""
        self._requests: set[asyncio.Task[Any]] = set()

    @property
    def is_overdue(self) -> bool:
        """Whether an engine that serves has been silent for so long that it should have answered a probe."""
        return self.serving.is_set() and self.liveness.is_overdue

    async def run(self) -> None:
        """Runs until cancelled. Raises the last `EngineError`, with the end of the log, if no start succeeds."""
        while True:
            if self.server is not None:
                await self._start(self.server)
            self._begin_incarnation()
            self.problem = await self._wait_for_problem()
            _log.error("%s", self.problem)
            self.serving.clear()
            for request in self._requests:
                request.cancel()
            if self.server is not None:
                await self.server.kill()
            else:
                await self.liveness.wait_until_responsive()

    async def generate(self, ticket: Ticket) -> list[Completion]:
        """As `Engine.generate`. An `EngineError` counts against the ticket, `EngineDown` does not."""
        return await self._request(lambda: self.engine.generate(ticket))

    async def sample_turn(self, request: TurnRequest) -> SampledTurn:
        """As `Engine.sample_turn`. An `EngineError` is about this turn, `EngineDown` is not."""
        return await self._request(lambda: self.engine.sample_turn(request))

    async def parse_reply(self, text: str, tools: Sequence[dict[str, Any]], opening: str = "") -> ParsedReply:
        """As `Engine.parse_reply`, with errors as those of `sample_turn`."""
        return await self._request(lambda: self.engine.parse_reply(text, tools, opening))

    async def check_tool_calls(self) -> None:
        """As `Engine.check_tool_calls`, with errors as those of `sample_turn`."""
        await self._request(self.engine.check_tool_calls)

    async def wait_until_confirmed(self, turns: Iterable[SampledTurn]) -> None:
        """As `Engine.wait_until_confirmed`, but raises `EngineDown`."""
        try:
            await self.engine.wait_until_confirmed(turns)
        except UnconfirmedWeights as error:
            raise EngineDown(str(error)) from error

    async def abort(self, rid: str) -> None:
        """As `Engine.abort`."""
        await self.engine.abort(rid)

    async def _request(self, ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Awaits `ask()`; raises `EngineDown` if the engine is not serving or stops serving, however that shows."""
        if not self.serving.is_set():
            raise EngineDown(self.problem or "the engine is starting")
        task, incarnation = asyncio.current_task(), self.incarnation
        assert task is not None
        request = asyncio.create_task(ask())
        self._requests.add(request)
        try:
            return await request
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            raise EngineDown(self.problem) from None
        except UnconfirmedWeights as error:
            raise EngineDown(str(error)) from error
        except EngineError as error:
            if await self.is_responsive(incarnation):
                raise
            raise EngineDown(f"{error}; {self.problem}") from error
        finally:
            self._requests.discard(request)

    async def is_responsive(self, incarnation: int) -> bool:
        """Whether the engine gives a sign of life before the next failed probe, and is still in this incarnation.

        The probe is sent at once, or when weights are loaded.
        """
        asked_at, liveness = time.monotonic(), self.liveness
        num_failed = liveness.num_failed_probes
        liveness.request_probe()
        while self.incarnation == incarnation and self.serving.is_set() and liveness.num_failed_probes == num_failed:
            if self.engine.last_heard_at > asked_at:
                return True
            await asyncio.sleep(POLL_S)
        return False

    def request_restart(self, incarnation: int, reason: str) -> None:
        """Restarts an engine that the replica owns on the verified weights, if it is still in this incarnation."""
        if self.server is not None and self.incarnation == incarnation:
            self._restart_reason = reason
            self.serving.clear()

    async def _start(self, server: EngineServer) -> None:
        for pause_s in (*START_PAUSES_S, None):
            try:
                _log.info("starting the engine")
                await server.start(*self._startup_weights())
                return
            except (EngineError, OSError) as error:
                if pause_s is None:
                    raise
                _log.error("the engine does not start; trying again in %g s: %s", pause_s, error)
                self.problem = f"the engine does not start: {str(error).splitlines()[0]}"
                await asyncio.sleep(pause_s)

    def _begin_incarnation(self) -> None:
        self.incarnation += 1
        if self.problem:
            _log.warning("the engine answers again")
        self.problem = ""
        if self.server is not None:
            self._restart_reason = ""
            self.engine.mark_restarted()
        self.liveness.begin()
        self.serving.set()
        _log.info("the engine serves")

    async def _wait_for_problem(self) -> str:
        """Returns a description of the problem as soon as the engine has one."""
        while True:
            await asyncio.sleep(POLL_S)
            if self.server is not None and not self.server.is_alive:
                return f"the engine exited with {self.server.returncode}: restarting it"
            if self._restart_reason:
                return f"{self._restart_reason}: restarting it"
            if await self.liveness.is_silent():
                what_next = "waiting until it does" if self.server is None else "restarting it"
                return f"the engine has not answered for {self.liveness.silent_s:.0f} s: {what_next}"
