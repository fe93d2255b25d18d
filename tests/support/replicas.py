"""A replica in this process, on whatever engine, and the learner that it sees, for the tests of both."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import redis
from safetensors.torch import load_file

from headrace.common.config import GenerationConfig, ModelConfig, RunConfig
from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import serve_in_thread
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.process.waiting import Waits
from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import Sampling, decode_heartbeat
from headrace.generation.engine.client import Engine, SwapTimings
from headrace.generation.engine.server import EngineServer
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.episode_rollouts import EpisodeRollouts
from headrace.generation.loop import Replica
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.rollouts import RewardedCompletions, RolloutSource
from headrace.generation.tickets.store import TicketStore
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.swap_slots import SwapSlots
from headrace.generation.weights.updater import WeightUpdater
from headrace.generation.weights.version_fetch import FetchedVersion
from headrace.learner.reporting.http_api import make_app
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.weights.publisher import WeightVersions
from tests.support.factories import make_ticket
from tests.support.guard import GUARD_S


@dataclass
class Learner:
    """What a replica sees of a learner."""

    store: LearnerStore
    versions: WeightVersions
    tensors: dict[str, object]
    prompt_tokens: list[int]

    def publish(self, step: int) -> int:
        weights = self.versions.snapshot(self.tensors)  # type: ignore[arg-type]
        return self.versions.publish(weights, step, self.versions.reserve()).version

    def issue(self, *names: str, max_new_tokens: int = 24, **changes: object) -> None:
        sampling = Sampling(temperature=1.0, max_new_tokens=max_new_tokens, stop_token_ids=[1])
        tickets = [make_ticket(name, prompt_tokens=self.prompt_tokens, sampling=sampling, **changes) for name in names]
        kind = tickets[0].kind
        self.store.add_tickets(self.store.keys.eval_tickets if kind == "eval" else self.store.keys.tickets, tickets)


@contextlib.contextmanager
def a_learner(client: redis.Redis, keys: Keys, folder: Path, demo_policy: Path) -> Iterator[Learner]:
    """It has published nothing yet."""
    tokenizer = load_tokenizer(ModelConfig(path=str(demo_policy)))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ann has 3 pens and buys 4. How many pens?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    store, sock = LearnerStore(client, keys), listen("127.0.0.1", 0)
    versions = WeightVersions(folder / "weights", store, socket_url(sock), "token")
    app = make_app(versions.root, dict, Switches(), "token")
    with serve_in_thread(app, sock):
        tensors = load_file(demo_policy / "model.safetensors")
        yield Learner(store, versions, dict(tensors), tokenizer.encode(text, add_special_tokens=False))
    versions.close()


@contextlib.asynccontextmanager
async def running_replica(
    redis_url: str,
    keys: Keys,
    engine: str | EngineServer,
    model: Path,
    name: str = "a",
    task: str = "arithmetic",
    liveness_timeout_s: float = GUARD_S,
    environment: dict[str, object] | None = None,
    **settings: object,
) -> AsyncIterator[Replica]:
    """Serves until the block ends, then drains. An engine that is a URL is somebody else's. `environment`: the settings
    of a task with `rollout`."""
    config = GenerationConfig.model_validate({"ticket_lease_s": 1.0, "max_attempts": 2, **settings})
    waits = Waits()
    client = connect_async(redis_url, waits)
    tickets = TicketStore(client, keys, name)
    await tickets.open()

    async def announce(timings: SwapTimings, fetched: FetchedVersion) -> None:
        event = {"weight_version": fetched.local.manifest.version, "pause_ms": timings.pause_s * 1e3}
        await tickets.announce("weight_swap", event)

    weights = WeightUpdater(
        client, keys, LocalWeights(model), Fetcher("token"), SwapSlots(client, keys, name, 0.5), announce
    )
    server = None if isinstance(engine, str) else engine
    url = engine if isinstance(engine, str) else engine.url
    http = Engine(url, swap_mode=config.engine.swap_mode, completion_timeout_s=config.completion_timeout_s)
    timeouts = {"liveness_timeout_s": liveness_timeout_s, "busy_timeout_s": config.completion_timeout_s}
    supervisor = EngineSupervisor(http, server, weights.startup_weights, **timeouts)
    rewards = RewardPool(task, {}, num_workers=1, deadline_s=GUARD_S, memory_bytes=4 << 30)
    rollouts: RolloutSource = RewardedCompletions(supervisor, rewards)
    closing = rewards.close
    if environment is not None:
        run = {"model": {"path": str(model)}, "task": {"name": task}, "environment": environment}
        rollouts = episodes = EpisodeRollouts(RunConfig.model_validate(run), supervisor)
        closing = episodes.close
    replica = Replica(
        name,
        "http://127.0.0.1:1",
        config,
        tickets,
        supervisor,
        rollouts,
        weights,
        waits,
        config.max_eval_groups_in_flight,
    )
    serving = asyncio.create_task(replica.serve(), name=f"replica {name}")
    try:
        yield replica
        replica.drain()
        await asyncio.wait_for(serving, GUARD_S)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for close in (http.aclose, closing, weights.close, client.aclose):
            await close()


async def until(condition: Callable[[], bool], timeout_s: float = GUARD_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def beat(client: redis.Redis, keys: Keys, name: str = "a") -> tuple[str, int]:
    """What a replica last said of itself."""
    heartbeat = decode_heartbeat(client.get(keys.replica(name)))
    return heartbeat.state, heartbeat.weight_version


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(GUARD_S):
            await scenario()

    asyncio.run(bounded())
