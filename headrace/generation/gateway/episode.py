"""One episode at the gateway: answers its requests, and is sealed when it is over."""

import asyncio
import time
from collections import Counter
from concurrent.futures import Executor
from typing import Literal, NamedTuple

import msgspec

from headrace.common.wire import Ticket
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.engine.reply_parsing import ParsedReply
from headrace.generation.gateway.answering import AnsweredEpisode
from headrace.generation.gateway.messages import to_message
from headrace.generation.gateway.rendering import Rendering
from headrace.generation.gateway.replies import ChatReply, cut_at_stop, sampled_reply, to_openai_message
from headrace.generation.gateway.request import ChatRequest
from headrace.generation.gateway.sampling import Sampler, parse_reply, sample_turn
from headrace.generation.gateway.segments import EpisodeRecord, MustWait, PlannedTurn


class EpisodeServices(NamedTuple):
    """What all episodes of a gateway share."""

    sampler: Sampler
    rendering: Rendering
    executor: Executor
    """Of one thread: renders and records, so that neither blocks the event loop nor meets another."""
    constrained: Literal["refuse", "ignore"]
    engine_wait_s: float
    ignored: Counter[str]


class OpenEpisode(AnsweredEpisode):
    """An episode whose replies the engine samples, and whose tokens are recorded."""

    def __init__(self, ticket: Ticket, base_url: str, api_key: str, model: str, services: EpisodeServices) -> None:
        super().__init__(base_url, api_key, model, services.constrained, services.ignored, services.executor)
        self.record = EpisodeRecord(ticket, services.rendering)
        self._ticket = ticket
        self._services = services
        self._num_calls = 0
        self._turn_ended = asyncio.Event()

    async def _seal(self) -> None:
        await self._in_thread(self.record.seal)

    async def _reply(self, request: ChatRequest) -> ChatReply:
        return await self._sample_reply(request, await self._plan(request))

    async def _plan(self, request: ChatRequest) -> PlannedTurn:
        began_s = time.time()
        while True:
            turn_ended = self._turn_ended
            try:
                return await self._in_thread(self.record.plan, request.conversation, request.max_tokens, began_s)
            except MustWait:
                await turn_ended.wait()

    async def _sample_reply(self, request: ChatRequest, turn: PlannedTurn) -> ChatReply:
        try:
            sampled, parsed = await self._sample(request, turn)
            message = to_openai_message(parsed, self._num_calls)
            self._num_calls += len(parsed.tool_calls)
            await self._in_thread(self.record.record, turn, sampled, to_message(message, 0), time.time())
        except BaseException:
            await self._in_thread(self.record.abandon, turn)
            raise
        finally:
            self._turn_ended.set()
            self._turn_ended = asyncio.Event()
        return sampled_reply(self.model, len(turn.prompt_tokens), sampled, message)

    async def _sample(self, request: ChatRequest, turn: PlannedTurn) -> tuple[SampledTurn, ParsedReply]:
        stop = [*self._ticket.sampling.stop, *request.stop]
        sampling = msgspec.structs.replace(self._ticket.sampling, max_new_tokens=turn.max_new_tokens, stop=stop)
        deadline_s = asyncio.get_running_loop().time() + self._services.engine_wait_s
        sampler = self._services.sampler
        sampled = await sample_turn(sampler, turn.prompt_tokens, sampling, deadline_s)
        is_cut = sampled.completion.finish_reason == "length"  # then a call may be half of one
        tools = request.conversation.tools if request.parses_calls and not is_cut else []
        text = cut_at_stop(sampled.completion.text, request.stop)
        return sampled, await parse_reply(sampler, text, tools, self._services.rendering.opening, deadline_s)
