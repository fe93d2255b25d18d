"""One episode at the gateway: answers its requests, and is sealed when it is over."""

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import msgspec

from headrace.common.wire import Ticket
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.engine.reply_parsing import ParsedReply
from headrace.generation.gateway.errors import EPISODE_OVER, BadRequest, GatewayError
from headrace.generation.gateway.exchanges import Exchange, Exchanges, key_of
from headrace.generation.gateway.messages import to_message
from headrace.generation.gateway.rendering import Rendering
from headrace.generation.gateway.replies import ChatReply, cut_at_stop, limit_reply, sampled_reply, to_openai_message
from headrace.generation.gateway.request import ChatRequest, read_request
from headrace.generation.gateway.sampling import Sampler, parse_reply, sample_turn
from headrace.generation.gateway.segments import (
    EpisodeOver,
    EpisodeRecord,
    LimitName,
    LimitReached,
    MustWait,
    PlannedTurn,
)

MAX_LIMIT_REPLIES = 10
"""In a row; the last of them is an error, for agents that do not look at the finish reason."""
NO_ROOM = "context_length_exceeded"
"""OpenAI's code, which agents answer by making the conversation shorter."""
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class EpisodeServices(NamedTuple):
    """What all episodes of a gateway share."""

    sampler: Sampler
    rendering: Rendering
    executor: Executor
    """Of one thread: renders and records, so that neither blocks the event loop nor meets another."""
    constrained: Literal["refuse", "ignore"]
    engine_wait_s: float
    ignored: Counter[str]


class OpenEpisode:
    """An episode whose agent may ask for replies, with `api_key`, at `base_url`."""

    def __init__(self, ticket: Ticket, base_url: str, api_key: str, model: str, services: EpisodeServices) -> None:
        self.base_url = base_url
        self.api_key = api_key
        self.model = model
        self.record = EpisodeRecord(ticket, services.rendering)
        self._ticket = ticket
        self._services = services
        self._exchanges = Exchanges()
        self._num_calls = 0
        self._num_limit_replies = 0
        self._turn_ended = asyncio.Event()
        self._idle_since = time.monotonic()

    @property
    def environment_s(self) -> float:
        """Seconds for which none of its requests has been under way; 0 while one is."""
        return 0.0 if self._exchanges.under_way() else time.monotonic() - self._idle_since

    async def exchange(self, content: bytes, headers: Mapping[str, str]) -> tuple[ChatRequest, Exchange]:
        """A request, and the exchange that answers it: the first one's if it is a retry. Raises `BadRequest`."""
        services = self._services
        request = await self._in_thread(read_request, content, services.constrained, services.ignored)
        key, may_be_retry = key_of(content, headers)
        found = self._exchanges.find(key) if may_be_retry else None
        return request, found or self._exchanges.add(key, asyncio.create_task(self._answer(request)))

    async def close(self) -> None:
        """Ends what is under way, in the engine too, and only then seals the record."""
        replies = [exchange.reply for exchange in self._exchanges.under_way()]
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
        await self._in_thread(self.record.seal)

    async def _answer(self, request: ChatRequest) -> ChatReply:
        """Raises `GatewayError`."""
        try:
            reply = await self._reply(request, await self._plan(request))
        except LimitReached as reached:
            return self._limit_reply(reached.name)
        except EpisodeOver as over:
            raise GatewayError(409, EPISODE_OVER) from over
        finally:
            self._idle_since = time.monotonic()
        self._num_limit_replies = 0
        return reply

    async def _plan(self, request: ChatRequest) -> PlannedTurn:
        began_s = time.time()
        while True:
            turn_ended = self._turn_ended
            try:
                return await self._in_thread(self.record.plan, request.conversation, request.max_tokens, began_s)
            except MustWait:
                await turn_ended.wait()

    async def _reply(self, request: ChatRequest, turn: PlannedTurn) -> ChatReply:
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

    def _limit_reply(self, limit: LimitName) -> ChatReply:
        self._num_limit_replies += 1
        if self._num_limit_replies >= MAX_LIMIT_REPLIES:
            raise GatewayError(409, f"the episode has reached its limit {limit}, and was told so before")
        if limit == "context":
            raise BadRequest("the conversation leaves no room for a reply in the context", NO_ROOM)
        return limit_reply(self.model, limit)

    async def _in_thread(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._services.executor, call)
