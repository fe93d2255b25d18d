"""A gateway with a model without weights behind it, and clients of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx

from headrace.common.config.environment import EnvironmentConfig
from headrace.common.models.bridge import Bridge
from headrace.common.wire import Ticket
from headrace.generation.engine.completions import SampledTurn, TurnRequest
from headrace.generation.engine.reply_parsing import ParsedReply
from headrace.generation.engine.supervisor import EngineDown
from headrace.generation.gateway.episode import OpenEpisode
from headrace.generation.gateway.server import Gateway
from tests.support.chat_families import chat_of
from tests.support.episodes import FakeModel, episode_ticket, stop_ids
from tests.support.guard import GUARD_S

Parse = Callable[[str, Sequence[dict[str, Any]]], ParsedReply]


class FakeSampler:
    """In the engine's place. While `may_answer` is not set, turns are under way; the next `num_down` of them find the
    engine down. `says` are the texts of the next replies; then they are random."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        self.model = FakeModel(self.name)
        self.says: list[str] = []
        self.parse: Parse = lambda text, tools: ParsedReply(text)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.has_begun = asyncio.Event()
        self.num_down = 0
        self.requests: list[TurnRequest] = []
        self.openings: list[str] = []
        self.num_aborted = 0

    async def sample_turn(self, request: TurnRequest) -> SampledTurn:
        self.requests.append(request)
        self.has_begun.set()
        if self.num_down:
            self.num_down -= 1
            raise EngineDown("the engine has not answered for 9 s")
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        text = self.says.pop(0) if self.says else None
        return self.model.sample(request.prompt_tokens, request.sampling.max_new_tokens, text)

    async def parse_reply(self, text: str, tools: Sequence[dict[str, Any]], opening: str) -> ParsedReply:
        self.openings.append(opening)
        return self.parse(text, tools)


class Client:
    """Of one episode, without retries of its own."""

    def __init__(self, episode: OpenEpisode) -> None:
        self.episode = episode
        header = {"Authorization": f"Bearer {episode.api_key}"}
        self.http = httpx.AsyncClient(base_url=episode.base_url, headers=header, timeout=GUARD_S, verify=False)

    async def post(
        self, *messages: dict[str, Any], headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        return await self.http.post("/chat/completions", json={"messages": list(messages), **body}, headers=headers)

    async def ask(self, *messages: dict[str, Any], **body: Any) -> dict[str, Any]:
        """The choice."""
        response = await self.post(*messages, **body)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


Body = Callable[[Client, FakeSampler], Awaitable[None]]


@contextlib.asynccontextmanager
async def a_gateway(
    name: str = "qwen2.5", engine_wait_s: float = GUARD_S, system_prompt: str | None = None, **settings: Any
) -> AsyncIterator[tuple[Gateway, FakeSampler]]:
    sampler = FakeSampler(name)
    bridge = Bridge(chat_of(name), stop_ids(name))
    gateway = Gateway(
        sampler,
        bridge,
        EnvironmentConfig(**settings),
        "policy",
        system_prompt=system_prompt,
        engine_wait_s=engine_wait_s,
    )
    async with gateway.serve():
        yield gateway, sampler


@contextlib.asynccontextmanager
async def a_client(gateway: Gateway, ticket: Ticket) -> AsyncIterator[Client]:
    async with gateway.open_episode(ticket) as episode:
        client = Client(episode)
        async with client.http:
            yield client


class SharedGateways:
    """One event loop and one gateway for each set of its settings, for many tests: a server takes long to end."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._served: dict[str, tuple[Gateway, FakeSampler]] = {}

    def play(self, body: Body, ticket: dict[str, Any] | None = None, name: str = "qwen2.5", **settings: Any) -> None:
        """Runs `body` with a client of an open episode of such a ticket."""
        self._runner.run(
            asyncio.wait_for(self._play(body, episode_ticket(name, **ticket or {}), name, settings), GUARD_S)
        )

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _play(self, body: Body, ticket: Ticket, name: str, settings: dict[str, Any]) -> None:
        key = f"{name} {settings}"
        if key not in self._served:
            self._served[key] = await self._stack.enter_async_context(a_gateway(name, **settings))
        gateway, sampler = self._served[key]
        sampler.reset()
        async with a_client(gateway, ticket) as client:
            await body(client, sampler)
