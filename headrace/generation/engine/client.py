"""The replica's client of one SGLang server: generate, swap the weights, ask what it serves.

`generate` checks the engine's replies: every token has a finite behaviour log-probability and belongs to one version
span, as reported by the engine, of a version that the engine has been confirmed to hold. `swap` lets requests in
flight continue under the new weights, always ends with generation continued, and returns only after the engine has
confirmed the version. `wait_for_progress` delays the next swap until those requests have made progress. Every call has
a deadline. Nothing is retried here: a failure is an `EngineError` that names the ticket or the call, and the caller
decides.
"""

import asyncio
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.wire import Ticket
from headrace.generation.engine.completions import Completion, Sample, generate_body, to_completion
from headrace.generation.engine.deadlines import CompletionDeadlines
from headrace.generation.engine.http_calls import CONTROL_TIMEOUT_S, EngineCalls, EngineError
from headrace.generation.engine.swapping import SwapMode, SwapTimings, UnconfirmedWeights, WeightSwapper

__all__ = ["Engine", "EngineError", "SwapTimings", "UnconfirmedWeights"]

ABORT_TIMEOUT_S = 1.0
RECOMPUTE_TIMEOUT_S = 60.0
POLL_S = 0.02
ONE_TOKEN = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}


class Engine:
    """One SGLang server at `url`. `completion_timeout_s` is the deadline of a `generate` (`CompletionDeadlines`),
    `swap_timeout_s` of the engine's loading of new weights."""

    def __init__(
        self,
        url: str,
        *,
        swap_mode: SwapMode = "retract",
        completion_timeout_s: float = 600.0,
        swap_timeout_s: float = 300.0,
    ) -> None:
        self.calls = EngineCalls(url)
        self._swapper = WeightSwapper(self.calls, swap_mode, swap_timeout_s)
        self._recomputes = swap_mode == "retract"
        self._in_flight: set[object] = set()
        self._deadlines = CompletionDeadlines(completion_timeout_s)

    @property
    def url(self) -> str:
        return self.calls.url

    @property
    def heard_at(self) -> float:
        """`time.monotonic()` of the last sign of life."""
        return self.calls.heard_at

    @property
    def is_loading(self) -> bool:
        """It reads and installs weights, or hashes what it holds, and can be asked for no other sign of life."""
        return self._swapper.is_loading

    @property
    def has_unverified_weights(self) -> bool:
        """A swap has failed after its pause, and none was confirmed since: it may hold other weights than it says."""
        return self._swapper.has_unverified_weights

    def mark_restarted(self) -> None:
        """It has been started again, on verified weights."""
        self._swapper.mark_restarted()

    async def aclose(self) -> None:
        await self.calls.aclose()

    async def generate(self, ticket: Ticket) -> list[Completion]:
        """`ticket.num_completions` completions in the engine's order.

        Cancelled or out of time, it aborts the request in the engine before it returns. Raises `UnconfirmedWeights`
        if a version was loaded under it and not confirmed, at once if that was so before it.
        """
        if self.has_unverified_weights:
            raise UnconfirmedWeights("a swap has failed, and the engine may hold other weights than it says")
        request = uuid.uuid4().hex  # no id may be a prefix of another: SGLang aborts by prefix
        rids = [f"{request}-{index}." for index in range(ticket.num_completions)]
        num_failed_swaps = self._swapper.num_failed_swaps
        try:
            async with self._deadlines.enforce(ticket.sampling.max_new_tokens):
                samples = await self.generate_unchecked(generate_body(ticket, rids))
        except TimeoutError as error:
            await self._abort(rids)
            allowance_s = self._deadlines.allowance_s(ticket.sampling.max_new_tokens)
            raise EngineError(
                f"ticket {ticket.id}: no reply, nor one to another ticket, within {allowance_s:g} s"
            ) from error
        except asyncio.CancelledError:
            await self._abort(rids)
            raise
        except EngineError as error:
            raise EngineError(f"ticket {ticket.id}: {error}") from error
        if len(samples) != ticket.num_completions:
            raise EngineError(f"ticket {ticket.id}: {len(samples)} completions, asked for {ticket.num_completions}")
        try:
            completions = [to_completion(sample) for sample in samples]
        except ValueError as error:
            raise EngineError(f"ticket {ticket.id}: {error}") from error
        versions = {span.version for completion in completions for span in completion.version_spans}
        await self._swapper.wait_until_confirmed(versions, num_failed_swaps)
        return completions

    async def generate_unchecked(self, body: dict[str, Any]) -> list[Sample]:
        """What the engine answers, unchecked and without a deadline."""
        request = object()
        self._in_flight.add(request)
        try:
            return await self.calls.call("/generate", list[Sample], body, timeout_s=None)
        finally:
            self._in_flight.discard(request)

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`; requests in flight go on under them.

        The folder is held against the checkpoint that the engine runs before anything is paused, what the engine
        holds against the folder when it has continued.
        """
        return await self._swapper.swap(folder, version)

    async def wait_for_progress(self, swapped: SwapTimings) -> None:
        """Returns when requests in flight have gone on for as long as the swap, with what it recomputes, took; or have
        ended.

        Else versions that come faster than what is in flight is computed again would leave each request a token per
        version, or none.
        """
        in_flight = set(self._in_flight) if self._recomputes else set()
        going_on = asyncio.create_task(self._wait_for_recompute(swapped))
        try:
            while not (going_on.done() or in_flight.isdisjoint(self._in_flight)):
                await asyncio.wait([going_on], timeout=POLL_S)
        finally:
            going_on.cancel()

    async def weight_version(self) -> int | None:
        """The version that the engine says it serves; None if it was started without one."""
        return await self._swapper.served_version()

    async def health(self, timeout_s: float = CONTROL_TIMEOUT_S) -> bool:
        """Whether the engine answers and its scheduler is alive. Takes a second: SGLang samples a token for it."""
        try:
            await self.calls.send("GET", "/health", None, timeout_s)
        except EngineError:
            return False
        return True

    async def _wait_for_recompute(self, swapped: SwapTimings) -> None:
        """Retracted requests are computed again in the order of their coming, before this small one, whose answer tells
        that they have been."""
        asked_s = time.monotonic()
        with suppress(EngineError):  # of an engine that is down, or so slow that it has had long enough
            await self.calls.call("/generate", msgspec.Raw, ONE_TOKEN, RECOMPUTE_TIMEOUT_S)
            await asyncio.sleep(swapped.pause_s + swapped.confirm_s + time.monotonic() - asked_s)

    async def _abort(self, rids: list[str]) -> None:
        """Ends the requests in the engine; it would notice the closed connection by itself, seconds later."""
        aborts = (self.calls.send("POST", "/abort_request", {"rid": rid}, ABORT_TIMEOUT_S) for rid in rids)
        await asyncio.gather(*aborts, return_exceptions=True)
