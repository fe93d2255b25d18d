"""The requests of one episode, whoever answers them: retries, limits that were reached, and the end."""

import abc
import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Literal, ParamSpec, TypeVar

from headrace.generation.gateway.errors import EPISODE_OVER, BadRequest, GatewayError
from headrace.generation.gateway.exchanges import Exchange, Exchanges, key_of
from headrace.generation.gateway.replies import ChatReply, limit_reply
from headrace.generation.gateway.request import ChatRequest, read_request
from headrace.generation.gateway.segments import EpisodeOver, LimitName, LimitReached

MAX_LIMIT_REPLIES = 10
"""In a row; the last of them is an error, for agents that do not look at the finish reason."""
NO_ROOM = "context_length_exceeded"
"""OpenAI's code, which agents answer by making the conversation shorter."""
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class AnsweredEpisode(abc.ABC):
    """An episode whose agent may ask for replies, with `api_key`, at `base_url`.

    `executor`: where what takes long on the CPU is computed; None: the event loop's.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        model: str,
        constrained: Literal["refuse", "ignore"],
        ignored: Counter[str],
        executor: Executor | None,
    ) -> None:
        self.base_url = base_url
        self.api_key = api_key
        self.model = model
        self._constrained: Literal["refuse", "ignore"] = constrained
        self._ignored = ignored
        self._executor = executor
        self._exchanges = Exchanges()
        self._num_limit_replies = 0
        self._idle_since = time.monotonic()

    @property
    def environment_s(self) -> float:
        """Seconds for which none of its requests has been under way; 0 while one is."""
        return 0.0 if self._exchanges.under_way() else time.monotonic() - self._idle_since

    async def exchange(self, content: bytes, headers: Mapping[str, str]) -> tuple[ChatRequest, Exchange]:
        """A request, and the exchange that answers it: the first one's if it is a retry. Raises `BadRequest`."""
        request = await self._in_thread(read_request, content, self._constrained, self._ignored)
        key, may_be_retry = key_of(content, headers)
        found = self._exchanges.find(key) if may_be_retry else None
        return request, found or self._exchanges.add(key, asyncio.create_task(self._answer(request)))

    async def close(self) -> None:
        """Ends what is under way, in the engine too, and only then seals the record."""
        replies = [exchange.reply for exchange in self._exchanges.under_way()]
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
        await self._seal()

    @abc.abstractmethod
    async def _reply(self, request: ChatRequest) -> ChatReply:
        """Samples and records a reply. Raises `GatewayError`, `LimitReached` or `EpisodeOver`."""

    @abc.abstractmethod
    async def _seal(self) -> None:
        """From now on nothing is recorded."""

    async def _answer(self, request: ChatRequest) -> ChatReply:
        """Raises `GatewayError`."""
        try:
            reply = await self._reply(request)
        except LimitReached as reached:
            return self._limit_reply(reached.name)
        except EpisodeOver as over:
            raise GatewayError(409, EPISODE_OVER) from over
        finally:
            self._idle_since = time.monotonic()
        self._num_limit_replies = 0
        return reply

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
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
