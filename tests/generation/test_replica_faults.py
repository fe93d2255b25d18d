"""A replica whose Redis, weights or neighbours fail it; its engine is a scripted server."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from headrace.common.process.waiting import Reason
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, decode_group, decode_heartbeat, decode_ticket, encode
from headrace.generation import ticket_processor
from headrace.generation.http_api import make_app
from headrace.generation.loop import Replica
from headrace.generation.tickets.retry_elsewhere import MAX_HAND_BACKS
from headrace.generation.tickets.store import Lease, TicketStore
from headrace.launcher.run.redis_server import launch_redis, start_redis, wait_for_redis
from headrace.learner.store.store import LearnerStore
from tests.support.fake_sglang import FakeSglang
from tests.support.guard import GUARD_S
from tests.support.replicas import Learner, a_learner, run, running_replica, until

ENGINE_SILENT = Reason.ENGINE_SILENT
Start = Callable[..., contextlib.AbstractAsyncContextManager[Replica]]


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        yield learner


@pytest.fixture
def start(redis_url: str, keys: Keys, fake: FakeSglang, demo_policy: Path) -> Start:
    def begin(**settings: object) -> contextlib.AbstractAsyncContextManager[Replica]:
        return running_replica(redis_url, keys, fake.url, demo_policy, **settings)  # type: ignore[arg-type]

    return begin


def test_a_ticket_is_handed_back_if_its_weights_do_not_arrive_in_time(
    learner: Learner, start: Start, keys: Keys
) -> None:
    client = learner.store.client
    learner.publish(0)
    learner.issue("0-0", min_weight_version=99)

    def first_entry() -> bytes:
        return next(iter(client.xrange(keys.tickets)), (b"",))[0]

    async def scenario() -> None:
        entry = first_entry()
        async with start(weights_timeout_s=1.0) as replica:
            await until(lambda: "version 99 is awaited, 1 is served" in replica.heartbeat().reason)
            [wait] = [wait for wait in replica.waits.status() if wait["reason"] == Reason.WAITING_FOR_WEIGHTS]
            assert wait["deadline_s"] == 1.0
            await until(lambda: first_entry() not in (b"", entry))

    run(scenario)
    [(_, fields)] = client.xrange(keys.tickets)
    assert decode_ticket(fields[b"ticket"]).attempts == 0


def test_status_shows_what_a_replica_waits_for(learner: Learner, start: Start) -> None:
    async def scenario() -> None:
        async with start() as replica:
            transport = httpx.ASGITransport(app=make_app(replica, "secret"))
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:

                async def waits() -> list[str]:
                    return [wait["reason"] for wait in (await http.get("/status")).json()["waits"]]

                await until(lambda: "version 1 is awaited" in replica.heartbeat().reason)
                assert await waits() == ["waiting_for_weights"]
                await asyncio.to_thread(learner.publish, 0)
                await until(lambda: replica.status.state == "running")
                assert await waits() == ["no_tickets"]
                replica.status.is_paused = True
                assert await waits() == ["paused"]

    run(scenario)


def test_an_external_engine_that_was_silent_must_confirm_its_weights(
    learner: Learner, start: Start, fake: FakeSglang, keys: Keys
) -> None:
    learner.publish(0)
    client = learner.store.client

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.status.state == "running")
            fake.hanging = {"/health", "/generate"}
            learner.issue("0-0")
            await until(lambda: "/generate" in fake.paths)
            replica.supervisor.liveness.timeout_s = 1.0
            await until(lambda: replica.status.state == "quarantined")
            heartbeat = replica.heartbeat()
            assert re.search(r"the engine has not answered for \d+ s: waiting until it does", heartbeat.reason)
            assert [(wait["reason"], wait["deadline_s"]) for wait in replica.waits.status()] == [(ENGINE_SILENT, None)]
            await until(lambda: replica.heartbeat().groups_in_flight == 0)
            replica.supervisor.liveness.timeout_s = GUARD_S
            fake.hanging = {"/model_info"}
            await until(lambda: replica.supervisor.incarnation == 2)
            assert replica.status.state == "starting" and client.xlen(keys.tickets) == 1
            fake.hanging = set()
            fake.closing.set()  # ends the hanging requests
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    [(_, fields)] = client.xrange(keys.groups)
    assert decode_group(fields[b"group"]).ticket.attempts == 0


def heartbeat_of(name: str, state: str = "running") -> bytes:
    return encode(Heartbeat(name, "http://127.0.0.1:1", state, "", 1, 0, 0, 0, 0.0, 0.0))  # type: ignore[arg-type]


@pytest.fixture
def hand_backs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the tickets that are handed back, in order."""
    seen: list[str] = []
    real = TicketStore.hand_back

    async def hand_back(self: TicketStore, lease: Lease) -> None:
        seen.append(lease.ticket.id)
        await real(self, lease)

    monkeypatch.setattr(TicketStore, "hand_back", hand_back)
    return seen


def test_a_ticket_that_failed_here_is_left_to_another_replica_but_not_for_ever(
    learner: Learner, start: Start, keys: Keys, hand_backs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_processor, "HAND_BACK_DELAY_S", 0.02)
    client = learner.store.client
    client.set(keys.replica("b"), heartbeat_of("b"))
    learner.publish(0)
    learner.issue("0-0", avoid=["a"], attempts=1)

    async def scenario() -> None:
        async with start():
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    assert hand_backs == ["0-0"] * MAX_HAND_BACKS
    [(_, fields)] = client.xrange(keys.groups)
    assert decode_group(fields[b"group"]).ticket.attempts == 1, "a hand-back does not count as an attempt"


@pytest.mark.parametrize(
    ("avoid", "heartbeat"),
    [
        (["b"], heartbeat_of("b")),
        (["a", "b"], heartbeat_of("b")),
        (["a"], heartbeat_of("b", "quarantined")),
        (["a"], b"no heartbeat"),
    ],
)
def test_a_ticket_is_not_left_to_others_if_that_would_not_help(
    learner: Learner, start: Start, keys: Keys, hand_backs: list[str], avoid: list[str], heartbeat: bytes
) -> None:
    client = learner.store.client
    client.set(keys.replica("b"), heartbeat)
    learner.publish(0)
    learner.issue("0-0", avoid=avoid)

    async def scenario() -> None:
        async with start():
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    assert hand_backs == []


def test_a_ticket_that_waits_to_be_handed_back_takes_no_slot(
    learner: Learner, start: Start, keys: Keys, hand_backs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_processor, "HAND_BACK_DELAY_S", 30.0)
    client = learner.store.client
    client.set(keys.replica("b"), heartbeat_of("b"))
    learner.publish(0)
    learner.issue("0-0", avoid=["a"])
    learner.issue("0-1")

    async def scenario() -> None:
        async with start(max_groups_in_flight=1):
            await until(lambda: client.xlen(keys.groups) == 1)
            assert hand_backs == []
        assert hand_backs == ["0-0"], "a drain does not wait for it"

    run(scenario)


def test_a_replica_survives_a_redis_that_lost_all_its_data(
    learner: Learner, start: Start, fake: FakeSglang, keys: Keys
) -> None:
    client = learner.store.client
    fake.hanging = {"/generate"}
    learner.publish(0)
    learner.issue("0-0")

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: replica.heartbeat().groups_in_flight == 1)
            client.delete(*client.scan_iter(match=keys.config.removesuffix("config") + "*"))
            await until(lambda: bool(client.exists(keys.replica("a"))))
            fake.hanging = set()
            fake.closing.set()
            await until(lambda: replica.heartbeat().groups_in_flight == 0)
            assert replica.weights.version == 1 and replica.status.state == "running"
            learner.store = LearnerStore(client, keys)
            learner.issue("0-1")
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)


def test_a_replica_waits_for_a_redis_that_restarts(
    tmp_path: Path, keys: Keys, fake: FakeSglang, demo_policy: Path
) -> None:
    folder = tmp_path / "redis"
    service, url = start_redis(folder, tmp_path / "redis.log")
    client = connect(url)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: service.stop(GUARD_S))
        stack.enter_context(client)
        learner = stack.enter_context(a_learner(client, keys, tmp_path, demo_policy))
        learner.publish(0)

        async def scenario() -> None:
            nonlocal service
            async with running_replica(url, keys, fake.url, demo_policy) as replica:
                await until(lambda: replica.status.state == "running")
                service.kill()
                await until(lambda: replica.waits.is_waiting(Reason.REDIS_UNREACHABLE))
                assert "Redis unreachable" in replica.status.reason and replica.status.state == "running"
                service = launch_redis(folder, tmp_path / "redis.log", int(url.rpartition(":")[2]))
                await asyncio.to_thread(wait_for_redis, service, url)
                await asyncio.to_thread(learner.issue, "0-0")
                await until(lambda: client.xlen(keys.groups) == 1)
                await until(lambda: decode_heartbeat(client.get(keys.replica("a"))).groups_committed == 1)
                await until(lambda: not replica.waits.is_waiting(Reason.REDIS_UNREACHABLE))

        run(scenario)


def test_a_replica_ends_if_no_weight_version_arrives(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.generation.loop.FIRST_VERSION_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        async with start() as replica:
            await until(lambda: "weights: version 1 is awaited, 0 is served" in replica.heartbeat().reason)
            await until(lambda: not any(task.get_name() == "replica a" for task in asyncio.all_tasks()))

    with pytest.raises(BaseExceptionGroup) as caught:
        run(scenario)
    assert caught.group_contains(TimeoutError, match=r"no weight version to serve within 1 s")
