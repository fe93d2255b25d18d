"""A replica with the real SGLang, a real Redis, real reward workers and weights over real HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
from safetensors.torch import load_file

from common.config import GenerationConfig
from common.http_service import bearer, listen, serve_in_thread, url_of
from common.keys import Keys
from common.redis_client import connect_async
from common.wire import Sampling, decode_group, decode_heartbeat, decode_ticket
from services.generation.api import make_app as make_replica_app
from services.generation.engine import Engine, SwapTimings
from services.generation.engine_server import EngineServer
from services.generation.loop import Replica
from services.generation.reward_pool import RewardPool
from services.generation.tickets import TicketStore
from services.generation.weights import WeightFollower
from services.learner.api import Switches, make_app
from services.learner.policy import load_tokenizer
from services.learner.store import LearnerStore
from services.learner.versions import Versions
from tests.making import make_ticket

DEADLINE_S = 60.0


@dataclass
class Learner:
    """What a replica sees of a learner."""

    store: LearnerStore
    versions: Versions
    tensors: dict[str, object]
    prompt_tokens: list[int]

    def publish(self, step: int) -> int:
        return self.versions.publish(self.tensors, step).version  # type: ignore[arg-type]

    def issue(self, *names: str, **changes: object) -> None:
        sampling = Sampling(temperature=1.0, max_new_tokens=24, stop_token_ids=[1])
        tickets = [make_ticket(name, prompt_tokens=self.prompt_tokens, sampling=sampling, **changes) for name in names]
        kind = tickets[0].kind
        self.store.add_tickets(self.store.keys.eval if kind == "eval" else self.store.keys.tickets, tickets)


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    tokenizer = load_tokenizer(str(demo_policy))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ann has 3 pens and buys 4. How many pens?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    store, sock = LearnerStore(client, keys), listen("127.0.0.1", 0)
    versions = Versions(tmp_path / "weights", store, url_of(sock), "token", num_kept=2)
    app = make_app(versions.root, dict, Switches(), "token")
    with serve_in_thread(app, sock):
        tensors = load_file(demo_policy / "model.safetensors")
        yield Learner(store, versions, dict(tensors), tokenizer.encode(text, add_special_tokens=False))
    versions.close()


@contextlib.asynccontextmanager
async def running_replica(
    redis_url: str,
    keys: Keys,
    engine_url: str,
    model: Path,
    name: str = "a",
    task: str = "arithmetic",
    **settings: object,
) -> AsyncIterator[Replica]:
    """Serves until the block ends, then drains."""
    config = GenerationConfig.model_validate({"lease_s": 1.0, "max_attempts": 2, **settings})
    client = connect_async(redis_url)
    tickets = TicketStore(client, keys, name)
    await tickets.open()
    rewards = RewardPool(task, {}, num_workers=1, deadline_s=20.0, memory_bytes=4 << 30)
    await rewards.start()

    async def announce(version: int, timings: SwapTimings, fetch_s: float, num_bytes: int) -> None:
        await tickets.announce("swap", {"version": version, "pause_ms": timings.pause_s * 1e3})

    weights = WeightFollower(client, keys, model, announce)
    engine = Engine(engine_url)
    replica = Replica(name, "http://127.0.0.1:1", config, tickets, engine, None, rewards, weights)
    serving = asyncio.create_task(replica.serve())
    try:
        yield replica
        replica.drain()
        await asyncio.wait_for(serving, DEADLINE_S)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for closing in (engine.aclose(), rewards.close(), weights.close(), client.aclose()):
            await closing


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)


def beat(client: redis.Redis, keys: Keys) -> tuple[str, int]:
    """What replica a last said of itself."""
    heartbeat = decode_heartbeat(client.get(keys.replica("a")))
    return heartbeat.state, heartbeat.weight_version


Start = Callable[..., contextlib.AbstractAsyncContextManager[Replica]]


@pytest.fixture
def start(redis_url: str, keys: Keys, engine_server: EngineServer, demo_policy: Path) -> Start:
    """A replica on the session's engine, whose version this run's first must exceed."""

    def begin(**settings: object) -> contextlib.AbstractAsyncContextManager[Replica]:
        return running_replica(redis_url, keys, engine_server.url, demo_policy, **settings)  # type: ignore[arg-type]

    return begin


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await scenario()

    asyncio.run(bounded())


def test_tickets_become_scored_groups_of_the_engines_versions(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)
    learner.issue("0-0", "0-1", num_completions=4)
    learner.issue("eval-0-0", kind="eval", num_completions=2)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: client.xlen(keys.groups) == 2 and client.xlen(keys.evaluated) == 1)
            await until(lambda: beat(client, keys) == ("running", 1))
            assert replica.heartbeat().groups_committed == 3
        assert not client.exists(keys.replica("a")), "a replica that left says so"

    run(scenario)
    groups = [decode_group(entry.payload) for entry in learner.store.read(10, 0.1)]
    for group in groups:
        assert {span.version for rollout in group.rollouts for span in rollout.version_spans} == {1}
        assert set(group.rewards) <= {0.0, 1.0}
        assert group.timings.leased_s <= group.timings.sampled_s <= group.timings.scored_s


def test_a_ticket_waits_for_its_minimum_version(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.weights.version == 1)
            learner.issue("0-0", min_weight_version=2)
            await until(lambda: replica.heartbeat().groups_in_flight == 1)
            assert client.xlen(keys.groups) == 0
            assert await asyncio.to_thread(learner.publish, 1) == 2
            replica.weights.look_now()
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    ((_, fields),) = client.xrange(keys.groups)
    assert decode_group(fields[b"group"]).oldest_version == 2
    assert len(learner.store.client.xrange(keys.events)) >= 2, "each swap is an event"


def test_a_reward_that_fails_costs_attempts_and_then_the_ticket_not_the_replica(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)
    learner.issue("0-0")

    async def scenario() -> None:
        async with start(task="tests.faulty_tasks:Raises") as replica:
            await until(lambda: client.xlen(keys.dead) == 1)
            assert replica.state == "running"

    run(scenario)
    ((_, dead),) = client.xrange(keys.dead)
    assert dead[b"id"] == b"0-0" and b"ticket 0-0" in dead[b"reason"]
    assert client.hget(keys.ledger, "0-0") == b"dead"


def test_a_paused_replica_leases_nothing(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.state == "running")
            replica.is_paused = True
            learner.issue("0-0")
            await until(lambda: beat(client, keys) == ("paused", 1))
            assert client.xlen(keys.groups) == 0
            replica.is_paused = False
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)


def test_a_drained_replica_hands_back_what_it_cannot_finish(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.generation.loop.DRAIN_TIMEOUT_S", 0.2)
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            learner.issue("0-9", min_weight_version=99)
            await until(lambda: replica.heartbeat().groups_in_flight == 1)

    run(scenario)
    assert client.hget(keys.ledger, "0-9") == b"open"
    ((_, fields),) = client.xrange(keys.tickets)
    assert decode_ticket(fields[b"ticket"]).attempts == 0, "a hand-back is no attempt"


def test_a_silent_replicas_ticket_is_claimed(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.publish(0)
    learner.issue("0-0")
    client.xreadgroup("generation", "dead-replica", {keys.tickets: ">"}, count=1)

    async def scenario() -> None:
        async with start(lease_s=0.5):
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    assert client.xlen(keys.tickets) == 0


def test_weights_that_do_not_match_quarantine_the_replica_until_a_good_version(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.state == "running")
            await asyncio.to_thread(learner.publish, 1)
            client.hset(keys.weights, mapping={"version": 50, "sha256": "0" * 64})
            replica.weights.look_now()
            await until(lambda: replica.state == "quarantined")
            assert "weights" in replica.reason
            await asyncio.to_thread(learner.publish, 2)
            replica.weights.look_now()
            await until(lambda: replica.state == "running" and replica.weights.version == 3)

    run(scenario)


def test_the_replicas_switches_need_the_token(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.state == "running")
            transport = httpx.ASGITransport(app=make_replica_app(replica, "secret"))
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
                assert (await http.get("/healthz")).json() == {"status": "ok"}
                assert (await http.get("/status")).json()["weight_version"] == 1
                for path in ("/pause", "/resume", "/drain", "/weights"):
                    assert (await http.post(path, json={"version": 1})).status_code == 401
                headers = bearer("secret")
                assert (await http.post("/pause", headers=headers)).json()["state"] == "paused"
                assert (await http.post("/resume", headers=headers)).json()["state"] == "running"
                assert (await http.post("/weights", json={"version": 0}, headers=headers)).status_code == 422
                assert (await http.post("/weights", json={"version": 1}, headers=headers)).status_code == 202
                assert (await http.post("/drain", headers=headers)).json()["state"] == "draining"

    run(scenario)
