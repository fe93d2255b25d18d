"""A replica that plays episodes, with the real SGLang, a real Redis and real environment workers."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, Limits, check_group, decode_group, decode_ticket
from headrace.common.wire.ledger import parse_ledger_entry
from headrace.generation.engine.server import EngineServer
from headrace.generation.loop import Replica
from tests.support.replicas import Learner, a_learner, run, running_replica, until

Start = Callable[..., contextlib.AbstractAsyncContextManager[Replica]]
EPISODES: dict[str, Any] = {"limits": Limits(max_turns=8, max_tokens=200, max_context_tokens=1000, max_segments=4)}
WORKER = "headrace.generation.environments.worker"


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        yield learner


@pytest.fixture
def start(redis_url: str, keys: Keys, engine_server: EngineServer, demo_policy: Path, learner: Learner) -> Start:
    """Starts a replica on the session's engine, which serves the run's first version."""
    learner.publish(0)

    def start_replica(**environment: object) -> contextlib.AbstractAsyncContextManager[Replica]:
        task = "tests.support.faulty_environments:Environment"
        settings = {"task": task, "environment": {"memory_bytes": 1 << 30, **environment}}
        return running_replica(redis_url, keys, engine_server.url, demo_policy, **settings)  # type: ignore[arg-type]

    return start_replica


def groups_in(client: redis.Redis, stream: str) -> list[Group]:
    return [decode_group(fields[b"group"]) for _, fields in client.xrange(stream)]


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.is_running() and WORKER in " ".join(process.cmdline())]


def test_tickets_become_groups_of_episodes(learner: Learner, start: Start, client: redis.Redis, keys: Keys) -> None:
    learner.issue("0-0", "0-1", reference={"do": "replies 3"}, num_completions=3, **EPISODES)
    learner.issue("eval-1-0", kind="eval", reference={"do": "replies 1"}, num_completions=1, **EPISODES)

    async def scenario() -> None:
        async with start():
            await until(lambda: client.xlen(keys.groups) == 2 and client.xlen(keys.eval_groups) == 1)

    run(scenario)
    for group in [*groups_in(client, keys.groups), *groups_in(client, keys.eval_groups)]:
        check_group(group)
        num_replies = 3 if group.ticket.kind == "train" else 1
        assert len(group.rollouts) == num_replies
        for rollout in group.rollouts:
            assert rollout.reward == num_replies
            assert [turn.role for turn in rollout.turns].count("assistant") == num_replies
    assert not workers()


def test_a_ticket_whose_episodes_fail_is_dead_with_the_reason(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys
) -> None:
    learner.issue("0-0", reference={"do": "fail 9"}, num_completions=2, **EPISODES)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: client.xlen(keys.dead_letters) == 1)
            assert replica.heartbeat().reason.startswith("rewards fail: ticket 0-0: episode ")

    run(scenario)
    ((_, dead),) = client.xrange(keys.dead_letters)
    assert b"of 2: ValueError: not yet at attempt 1" in dead[b"reason"] and b"completions" in dead
    assert parse_ledger_entry(client.hget(keys.ledger, "0-0")).state == "dead"


def test_killed_workers_cost_no_group(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    learner.issue("0-0", reference={"do": f"until {tmp_path / 'go'}"}, num_completions=2, **EPISODES)

    async def scenario() -> None:
        async with start():
            await until(lambda: len(workers()) == 1)
            await until(lambda: client.xpending(keys.tickets, "generation")["pending"] == 1)
            for worker in workers():
                worker.kill()
            (tmp_path / "go").touch()
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    (group,) = groups_in(client, keys.groups)
    assert [rollout.failed_episodes for rollout in group.rollouts] == [0, 0]
    assert client.xlen(keys.dead_letters) == 0


def test_a_group_that_is_too_large_is_refused_here(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.ticket_processor.MAX_GROUP_BYTES", 100)
    learner.issue("0-0", reference={"do": "replies 1"}, num_completions=1, **EPISODES)

    async def scenario() -> None:
        async with start():
            await until(lambda: client.xlen(keys.dead_letters) == 1)

    run(scenario)
    ((_, dead),) = client.xrange(keys.dead_letters)
    assert dead[b"reason"].startswith(b"ticket 0-0 has a group of ") and dead[b"reason"].endswith(b", more than 100")


def test_a_drain_waits_for_episodes(
    learner: Learner,
    start: Start,
    client: redis.Redis,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headrace.generation.loop.DRAIN_TIMEOUT_S", 0.0)
    learner.issue("0-0", reference={"do": f"until {tmp_path / 'go'}"}, num_completions=1, **EPISODES)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.heartbeat().groups_in_flight == 1)
            replica.drain()
            (tmp_path / "go").touch()

    run(scenario)
    assert len(groups_in(client, keys.groups)) == 1


def test_a_hurried_drain_hands_the_ticket_back(
    learner: Learner, start: Start, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.loop.DRAIN_TIMEOUT_S", 0.1)
    learner.issue("0-0", reference={"do": "wait"}, num_completions=1, **EPISODES)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.heartbeat().groups_in_flight == 1)
            replica.drain()
            replica.drain(is_hurried=True)

    run(scenario)
    ((_, fields),) = client.xrange(keys.tickets)
    assert decode_ticket(fields[b"ticket"]).attempts == 0
    assert not workers()
