"""A replica with the real SGLang, a real Redis, real reward workers and weights over real HTTP."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from headrace.common.http.addresses import bearer_header
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_group, decode_ticket
from headrace.common.wire.ledger import parse_ledger_entry
from headrace.generation import loop
from headrace.generation.engine.server import EngineServer
from headrace.generation.http_api import make_app as make_replica_app
from headrace.generation.loop import Replica
from headrace.generation.workers.process import TaskError
from tests.support.replicas import Learner, a_learner, beat, run, running_replica, until

Start = Callable[..., contextlib.AbstractAsyncContextManager[Replica]]


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        yield learner


@pytest.fixture
def start(redis_url: str, keys: Keys, engine_server: EngineServer, demo_policy: Path) -> Start:
    """Starts a replica on the session's engine; the run's first version must exceed the engine's."""

    def begin(**settings: object) -> contextlib.AbstractAsyncContextManager[Replica]:
        return running_replica(redis_url, keys, engine_server.url, demo_policy, **settings)  # type: ignore[arg-type]

    return begin


def test_tickets_become_scored_groups_of_the_engines_versions(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)
    learner.issue("0-0", "0-1", num_completions=4)
    learner.issue("eval-0-0", kind="eval", num_completions=2)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: client.xlen(keys.groups) == 2 and client.xlen(keys.eval_groups) == 1)
            await until(lambda: beat(client, keys) == ("running", 1))
            await until(lambda: replica.heartbeat().groups_committed == 3)
        assert not client.exists(keys.replica("a")), "a drained replica deletes its heartbeat"

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
            replica.weights.hint(1)
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    ((_, fields),) = client.xrange(keys.groups)
    assert decode_group(fields[b"group"]).oldest_version == 2
    assert len(learner.store.client.xrange(keys.events)) >= 2, "each swap is an event"


def test_a_failing_reward_uses_up_the_attempts_and_then_dead_letters_the_ticket(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)
    learner.issue("0-0")

    async def scenario() -> None:
        async with start(task="tests.support.faulty_tasks:Raises") as replica:
            await until(lambda: client.xlen(keys.dead_letters) == 1)
            assert replica.status.state == "running"
            told = "rewards fail: ticket 0-0: completion 1 of 2: RuntimeError: no reward today"
            await until(lambda: replica.heartbeat().reason.startswith(told))

    run(scenario)
    ((_, dead),) = client.xrange(keys.dead_letters)
    assert dead[b"id"] == b"0-0" and b"ticket 0-0" in dead[b"reason"]
    assert len(json.loads(dead[b"completions"])) == 2, "completions that could not be scored are kept"
    assert parse_ledger_entry(client.hget(keys.ledger, "0-0")).state == "dead"


def test_a_task_that_no_worker_can_load_ends_the_replica(learner: Learner, start: Start) -> None:
    """Workers start beside the engine; their error ends the replica before there are weights."""

    async def scenario() -> None:
        with pytest.raises(ExceptionGroup) as failure:
            async with start(task="tests.support.faulty_tasks:Absent"):
                await until(lambda: "replica a" not in {task.get_name() for task in asyncio.all_tasks()})
        assert failure.group_contains(TaskError)

    run(scenario)


def test_a_replica_that_begins_to_serve_sends_a_heartbeat_at_once(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "HEARTBEAT_INTERVAL_S", 1000.0)

    async def scenario() -> None:
        async with start():
            await until(lambda: bool(client.exists(keys.replica("a"))))
            assert beat(client, keys)[0] == "starting"
            await asyncio.to_thread(learner.publish, 0)
            await until(lambda: beat(client, keys) == ("running", 1))

    run(scenario)


def test_a_paused_replica_leases_nothing(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.status.state == "running")
            replica.status.is_paused = True
            learner.issue("0-0")
            await until(lambda: beat(client, keys) == ("paused", 1))
            assert client.xlen(keys.groups) == 0
            replica.status.is_paused = False
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)


def test_a_drained_replica_hands_back_what_it_cannot_finish(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.loop.DRAIN_TIMEOUT_S", 0.2)
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            learner.issue("0-9", min_weight_version=99)
            await until(lambda: replica.heartbeat().groups_in_flight == 1)

    run(scenario)
    assert parse_ledger_entry(client.hget(keys.ledger, "0-9")).state == "open"
    ((_, fields),) = client.xrange(keys.tickets)
    assert decode_ticket(fields[b"ticket"]).attempts == 0, "a hand-back does not count as an attempt"


def test_the_ticket_of_a_silent_replica_is_claimed(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)
    learner.issue("0-0")
    client.xreadgroup("generation", "dead-replica", {keys.tickets: ">"}, count=1)

    async def scenario() -> None:
        async with start(ticket_lease_s=0.5):
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    assert client.xlen(keys.tickets) == 0


def test_weights_that_do_not_match_quarantine_the_replica_until_a_good_version(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.status.state == "running")
            await asyncio.to_thread(learner.publish, 1)
            client.hset(keys.weights, mapping={"version": 50, "sha256": "0" * 64})
            replica.weights.hint(1)
            await until(lambda: replica.status.state == "quarantined")
            assert "weights" in replica.status.reason
            await asyncio.to_thread(learner.publish, 2)
            replica.weights.hint(1)
            await until(lambda: replica.status.state == "running" and replica.weights.version == 3)

    run(scenario)


def test_the_replicas_switches_need_the_token(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.publish(0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.status.state == "running")
            transport = httpx.ASGITransport(app=make_replica_app(replica, "secret"))
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
                assert (await http.get("/healthz")).json() == {"status": "ok"}
                assert (await http.get("/status")).json()["weight_version"] == 1
                for path in ("/pause", "/resume", "/drain", "/weights"):
                    assert (await http.post(path, json={"version": 1})).status_code == 401
                headers = bearer_header("secret")
                assert (await http.post("/pause", headers=headers)).json()["state"] == "paused"
                assert (await http.post("/resume", headers=headers)).json()["state"] == "running"
                assert (await http.post("/weights", json={"version": 0}, headers=headers)).status_code == 422
                assert (await http.post("/weights", json={"version": 1}, headers=headers)).status_code == 202
                assert (await http.post("/drain", headers=headers)).json()["state"] == "draining"

    run(scenario)
