"""The replica's client of one SGLang server: generates, swaps the weights, reads the served version.

`generate` answers a ticket, `sample_turn` one request of an episode. Both check the engine's reply: every token has a
finite behaviour log-probability and belongs to one version span, as reported by the engine, of a version that the
engine has been confirmed to hold (for turns, `wait_until_confirmed` asks). `swap` lets requests in flight continue
under the new weights, always ends with generation continued, and returns only after the engine has confirmed the
version. `wait_for_progress` delays the next swap until those requests have made progress. Every call has a deadline.
Nothing is retried here: a failure is an `EngineError` that names the ticket or the call, and the caller decides.
"""

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headrace.common.wire import Ticket
from headrace.generation.engine.completions import (
    Completion,
    Sample,
    SampledTurn,
    TurnRequest,
    generate_body,
    rid_of,
    to_completion,
    turn_body,
)
from headrace.generation.engine.deadlines import CompletionDeadlines
from headrace.generation.engine.http_calls import CONTROL_TIMEOUT_S, EngineCalls, EngineError, Reply
from headrace.generation.engine.reply_parsing import AUTO, ParsedReply, ReplyParser
from headrace.generation.engine.swaps.checks import SwapMode
from headrace.generation.engine.swaps.progress import RequestProgress
from headrace.generation.engine.swaps.swapping import SwapTimings, UnconfirmedWeights, WeightSwapper

__all__ = ["Engine", "EngineError", "SwapTimings", "UnconfirmedWeights"]

ABORT_TIMEOUT_S = 1.0


class Engine:
    """One SGLang server at `url`. `completion_timeout_s` is the deadline of `generate` (`CompletionDeadlines`),
    `swap_timeout_s` that of loading new weights."""

    def __init__(
        self,
        url: str,
        *,
        swap_mode: SwapMode = "retract",
        completion_timeout_s: float = 600.0,
        swap_timeout_s: float = 300.0,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> None:
        self.calls = EngineCalls(url)
        self._reply_parser = ReplyParser(self.calls, tool_call_parser, reasoning_parser)
        self._swapper = WeightSwapper(self.calls, swap_mode, swap_timeout_s)
        self._progress = RequestProgress(self.calls, recomputes=swap_mode == "retract")
        self._deadlines = CompletionDeadlines(completion_timeout_s)

    @property
    def url(self) -> str:
        return self.calls.url

    @property
    def last_heard_at(self) -> float:
        """`time.monotonic()` of the last sign of life."""
        return self.calls.last_heard_at

    @property
    def is_loading(self) -> bool:
        """Whether the engine reads, installs or hashes weights; it answers no probes meanwhile."""
        return self._swapper.is_loading

    @property
    def has_unverified_weights(self) -> bool:
        """True after a swap failed after its pause, until one is confirmed: the engine may hold other weights than it
        reports."""
        return self._swapper.has_unverified_weights

    def mark_restarted(self) -> None:
        """To be called after the engine has been restarted on verified weights."""
        self._swapper.mark_restarted()

    async def aclose(self) -> None:
        await self.calls.aclose()

    async def generate(self, ticket: Ticket) -> list[Completion]:
        """Returns `ticket.num_completions` completions in the engine's order.

        When cancelled or out of time, it aborts the request in the engine before it returns. Raises
        `UnconfirmedWeights` if a version that was loaded during the request is not confirmed, and at once if the engine
        already has unverified weights.
        """
        request = uuid.uuid4().hex
        rids = [rid_of(f"{request}-{index}") for index in range(ticket.num_completions)]
        num_failed_swaps = self._swapper.num_failed_swaps
        name, max_new_tokens = f"ticket {ticket.id}", ticket.sampling.max_new_tokens
        samples = await self._sample(name, generate_body(ticket, rids), rids, max_new_tokens, list[Sample])
        if len(samples) != ticket.num_completions:
            raise EngineError(f"ticket {ticket.id}: {len(samples)} completions, asked for {ticket.num_completions}")
        completions = [_checked(name, sample) for sample in samples]
        await self._swapper.wait_until_confirmed(_versions(completions), num_failed_swaps)
        return completions

    async def sample_turn(self, request: TurnRequest) -> SampledTurn:
        """Returns one reply. Cancellation, deadline and errors are as for `generate`, but nothing waits for the
        confirmation of a version: that is left to `wait_until_confirmed`."""
        name, num_failed_swaps = f"turn {request.rid}", self._swapper.num_failed_swaps
        rids, max_new_tokens = [rid_of(request.rid)], request.sampling.max_new_tokens
        sample = await self._sample(name, turn_body(request), rids, max_new_tokens, Sample)
        completion, meta = _checked(name, sample), sample.meta_info
        if meta.prompt_tokens != len(request.prompt_tokens):
            raise EngineError(f"{name}: sampled behind {meta.prompt_tokens} tokens, sent {len(request.prompt_tokens)}")
        unconfirmed = self._swapper.unconfirmed(_versions([completion]), num_failed_swaps)
        # SGLang counts again what it finds when it goes on with a request that it had put back.
        return SampledTurn(completion, min(meta.cached_tokens, meta.prompt_tokens), unconfirmed)

    async def wait_until_confirmed(self, turns: Iterable[SampledTurn]) -> None:
        """Waits for swaps that were being confirmed when a turn ended; raises `UnconfirmedWeights` if one fails."""
        for turn in turns:
            if turn.unconfirmed is not None:
                await self._swapper.wait_until_confirmed(turn.unconfirmed.versions, turn.unconfirmed.num_failed_swaps)

    async def abort(self, rid: str) -> None:
        """Ends the turn `rid` in the engine, if it is there; never raises an `EngineError`."""
        await self._abort([rid_of(rid)])

    async def parse_reply(self, text: str, tools: Sequence[dict[str, Any]], opening: str = "") -> ParsedReply:
        """The parts of a reply to a request that offered `tools` (`ReplyParser.parse`); a reply that was cut at its
        limit has no calls, so pass no tools then."""
        return await self._reply_parser.parse(text, tools, opening)

    async def check_tool_calls(self) -> None:
        """Raises `EngineError` if the engine cannot parse tool calls; for tasks whose prompts have tools."""
        await self._reply_parser.check_tool_calls()

    async def generate_unchecked(self, body: dict[str, Any], reply_type: type[Reply]) -> Reply:
        """Returns the engine's reply to `/generate`, unchecked and without a deadline."""
        with self._progress.in_flight():
            return await self.calls.call("/generate", reply_type, body, timeout_s=None)

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`; requests in flight continue under them.

        The folder's tensors are compared with those of the engine's checkpoint before the pause, and the engine's
        tensors with the folder's after it.
        """
        return await self._swapper.swap(folder, version)

    async def wait_for_progress(self, swapped: SwapTimings) -> None:
        """Returns when the requests in flight have made progress (`RequestProgress`)."""
        await self._progress.wait(swapped)

    async def weight_version(self) -> int | None:
        """The version that the engine reports; None if it was started without one."""
        return await self._swapper.served_version()

    async def health(self, timeout_s: float = CONTROL_TIMEOUT_S) -> bool:
        """Whether the engine answers and its scheduler is alive. Takes a second: SGLang samples a token."""
        try:
            await self.calls.send("GET", "/health", None, timeout_s)
        except EngineError:
            return False
        return True

    async def _sample(
        self, name: str, body: dict[str, Any], rids: list[str], max_new_tokens: int, reply_type: type[Reply]
    ) -> Reply:
        """The engine's reply to `/generate`, before the deadline; errors begin with `name`."""
        if self.has_unverified_weights:
            raise UnconfirmedWeights("a swap has failed, and the engine may hold other weights than it reports")
        try:
            async with self._deadlines.enforce(max_new_tokens):
                return await self.generate_unchecked(body, reply_type)
        except TimeoutError as error:
            await self._abort(rids)
            allowance_s = self._deadlines.allowance_s(max_new_tokens)
            raise EngineError(
                f"{name}: the engine answered neither it nor another request within {allowance_s:g} s"
            ) from error
        except asyncio.CancelledError:
            await self._abort(rids)
            raise
        except EngineError as error:
            raise EngineError(f"{name}: {error}") from error

    async def _abort(self, rids: list[str]) -> None:
        """Ends the requests in the engine, which would notice the closed connection only seconds later."""
        aborts = (self.calls.send("POST", "/abort_request", {"rid": rid}, ABORT_TIMEOUT_S) for rid in rids)
        await asyncio.gather(*aborts, return_exceptions=True)


def _checked(name: str, sample: Sample) -> Completion:
    try:
        return to_completion(sample)
    except ValueError as error:
        raise EngineError(f"{name}: {error}") from error


def _versions(completions: Iterable[Completion]) -> set[int]:
    return {span.version for completion in completions for span in completion.version_spans}
