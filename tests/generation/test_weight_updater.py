"""The weight updater follows the published versions despite faults of Redis, the learner or the engine."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from headrace.common.config import EngineConfig
from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import version_folder
from headrace.generation.engine.client import Engine, SwapTimings
from headrace.generation.engine.server import EngineServer
from headrace.generation.engine.supervisor import EngineDown, EngineSupervisor
from headrace.generation.engine.swaps.checks import SwapMode
from headrace.generation.weights import version_fetch
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.swap_slots import SwapSlots
from headrace.generation.weights.update_path import UpdatePath
from headrace.generation.weights.updater import WeightUpdater
from headrace.generation.weights.version_fetch import FetchedVersion
from headrace.learner.weights.version_writer import VersionWriter
from tests.support.factories import make_ticket
from tests.support.fake_sglang import FakeSglang, a_fake_sglang, server_info
from tests.support.guard import GUARD_S
from tests.support.replicas import Learner, a_learner, run, until


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        yield learner


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with a_fake_sglang() as server:
        yield server


@contextlib.asynccontextmanager
async def updating(
    redis_url: str, keys: Keys, fake: FakeSglang | EngineServer, model: Path, swap_mode: SwapMode = "retract"
) -> AsyncIterator[tuple[WeightUpdater, EngineSupervisor]]:
    async def ignore(timings: SwapTimings, fetched: FetchedVersion) -> None:
        pass

    client, engine = connect_async(redis_url), Engine(fake.url, swap_mode=swap_mode)
    updater = WeightUpdater(
        client, keys, LocalWeights(model), Fetcher("token"), SwapSlots(client, keys, "a", 0.5), ignore
    )
    server = fake if isinstance(fake, EngineServer) else None
    supervisor = EngineSupervisor(
        engine, server, updater.startup_weights, liveness_timeout_s=GUARD_S, busy_timeout_s=GUARD_S
    )
    tasks = [asyncio.create_task(supervisor.run()), asyncio.create_task(updater.run(supervisor))]
    try:
        yield updater, supervisor
        assert not any(task.done() for task in tasks), "it continues whatever happens"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for closing in (engine.aclose(), updater.close(), client.aclose()):
            await closing
        if server is not None:
            await server.stop()


SILENCE_S = 1.0
GOOD = {"version": "7", "sha256": "0" * 64, "url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (GOOD | {"version": "seven"}, "'seven'"),
        (GOOD | {"version": "-7"}, "'-7'"),
        (GOOD | {"version": "9" * 5000}, "999"),
        (GOOD | {"version": b"\xff\xfe"}, "expected a number"),
        ({"version": "7", "url": "http://127.0.0.1:1"}, "'sha256': ''"),
        ({"version": "7", "sha256": "0" * 64}, "'url': ''"),
        ({"sha256": "0" * 64, "url": "http://127.0.0.1:1"}, "'version': ''"),
        (GOOD, "version 7: http://127.0.0.1:1: ConnectError"),
        (GOOD | {"url": "http://[::"}, "version 7: http://[::: InvalidURL"),
        (GOOD | {"url": "ftp://127.0.0.1"}, "version 7: ftp://127.0.0.1: UnsupportedProtocol"),
        (GOOD | {"url": "http://a:b:c"}, "version 7: http://a:b:c: "),
    ],
)
def test_invalid_fields_in_redis_quarantine_the_replica_with_a_reason(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path,
    fields: dict[str, str], problem: str,
) -> None:  # fmt: skip
    learner.store.client.hset(keys.weights, mapping=fields)

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: updater.problem != "")
            assert problem in updater.problem and len(updater.problem) < 1000
            learner.store.client.delete(keys.weights)
            version = await asyncio.to_thread(learner.publish, 1)
            updater.hint(version)
            await until(lambda: (updater.version, updater.problem) == (version, ""))

    run(scenario)


def test_a_weights_key_of_another_type_is_a_reason_too(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path
) -> None:
    learner.store.client.set(keys.weights, "nonsense")

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: "WRONGTYPE" in updater.problem)

    run(scenario)


def test_a_version_that_was_deleted_during_the_fetch_is_skipped_without_a_quarantine(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = learner.publish(0)
    problems: list[str] = []
    real = version_fetch._FetchAttempt._fetch

    async def outrun(self: Any, update_path: UpdatePath) -> None:
        """Publishes three more versions, each an anchor, while this one is being fetched."""
        if update_path.model is not None and update_path.model.version == first:
            for step in (1, 2, 3):
                learner.versions._writer = VersionWriter("another")
                await asyncio.to_thread(learner.publish, step)
            assert not version_folder(learner.versions.root, first).exists()
        await real(self, update_path)

    monkeypatch.setattr(version_fetch._FetchAttempt, "_fetch", outrun)
    monkeypatch.setattr("headrace.generation.weights.updater._log.error", lambda *given: problems.append(str(given)))

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: updater.version == first + 3)
            assert list(updater.local.root.glob("v*")) == [updater.local.current_folder], "nothing is left"

    run(scenario)
    assert problems == []


def test_a_missing_version_without_a_newer_one_is_a_reason(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path
) -> None:
    version = learner.publish(0)
    learner.store.client.hset(keys.weights, "version", version + 1)

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: "HTTPStatusError" in updater.problem)
            assert "404" in updater.problem

    run(scenario)


def test_a_fetch_that_trickles_ends_at_its_deadline(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake sends single bytes at intervals, so that no single read takes long."""
    monkeypatch.setattr(version_fetch, "FETCH_DEADLINE_S", 0.5)
    fake.trickling.add("/weights/7/manifest.json")
    learner.store.client.hset(keys.weights, mapping=GOOD | {"url": fake.url})

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: "version 7 did not arrive within 0.5 s" in updater.problem)

    run(scenario)


def test_an_external_engine_that_was_restarted_gets_its_weights_back(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path
) -> None:
    version = learner.publish(0)

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, supervisor):
            await until(lambda: updater.version == version)
            fake.hanging = {"/health"}
            supervisor.liveness.timeout_s = SILENCE_S
            await until(lambda: not supervisor.serving.is_set())
            supervisor.liveness.timeout_s = GUARD_S
            fake.calls.clear()
            fake.serve_version("default")
            fake.hanging = set()
            await until(lambda: updater.confirmed_incarnation == 2)
            [update] = [body for path, body in fake.calls if path == "/update_weights_from_disk"]
            assert (update["weight_version"], update["model_path"]) == (str(version), str(updater.local.current_folder))

    run(scenario)


def test_an_external_engine_that_failed_halfway_is_quarantined_until_a_swap_is_confirmed(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path
) -> None:
    """Also if the failed version is gone: then the one before is loaded again."""
    first = learner.publish(0)

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, supervisor):
            await until(lambda: updater.version == first)
            fake.fails_halfway = True
            updater.hint(await asyncio.to_thread(learner.publish, 1))
            await until(lambda: "Rolling back" in updater.problem)
            with pytest.raises(EngineDown, match="may hold other weights"):
                await supervisor.generate(make_ticket("0-0"))
            learner.store.client.delete(keys.weights)
            fake.calls.clear()
            fake.fails_halfway = False
            await until(lambda: updater.problem == "")
            [update] = [body for path, body in fake.calls if path == "/update_weights_from_disk"]
            assert (updater.version, update["weight_version"]) == (first, str(first))

    run(scenario)


def test_an_own_engine_that_failed_halfway_is_restarted_on_the_last_verified_version(
    learner: Learner, redis_url: str, keys: Keys, demo_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[Path, int | None]] = []

    def command(_settings: object, _dtype: str, model: Path, version: int | None, port: int, *_: object) -> list[str]:
        starts.append((model, version))
        return [sys.executable, "-m", "tests.support.fake_sglang", str(port), str(version or "default")]

    monkeypatch.setattr("headrace.generation.engine.server.launch_command", command)
    server = EngineServer(EngineConfig(device="cpu", startup_timeout_s=GUARD_S), "float32", tmp_path / "sglang.log")

    async def scenario() -> None:
        first = await asyncio.to_thread(learner.publish, 0)
        async with updating(redis_url, keys, server, demo_policy) as (updater, supervisor):
            await until(lambda: updater.version == first)
            folder = updater.local.current_folder
            async with httpx.AsyncClient(trust_env=False, timeout=GUARD_S) as http:
                await http.post(f"{server.url}/script", json={"fails_halfway": True})
            updater.hint(await asyncio.to_thread(learner.publish, 1))
            await until(lambda: updater.version == first + 1)
            assert starts == [(demo_policy, None), (folder, first)] and supervisor.incarnation == 2
            assert (updater.problem, supervisor.problem, supervisor.engine.has_unverified_weights) == ("", "", False)

    run(scenario)


def test_nothing_is_swapped_into_an_engine_that_is_down(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.engine.liveness.PROBE_PAUSE_S", 0.1)
    version = learner.publish(0)
    fake.hanging = {"/health"}
    answers = fake.replies["/server_info"]
    fake.replies["/server_info"] = (500, {})

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, supervisor):
            await until(lambda: "/server_info answered 500" in updater.problem)
            supervisor.liveness.timeout_s = SILENCE_S
            await until(lambda: not supervisor.serving.is_set())
            fake.calls.clear()
            await until(lambda: fake.paths.count("/health") >= 2)  # a swap that had begun has failed by then
            fake.calls.clear()
            await until(lambda: len(fake.calls) >= 2)
            assert set(fake.paths) == {"/health"}
            fake.replies["/server_info"] = answers
            supervisor.liveness.timeout_s = GUARD_S
            fake.hanging = set()
            await until(lambda: (updater.version, updater.problem) == (version, ""))

    run(scenario)


@pytest.mark.parametrize(("swap_mode", "waits"), [("retract", True), ("in_place", False)])
def test_the_next_swap_waits_until_retracted_requests_have_made_progress(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path, swap_mode: SwapMode, waits: bool
) -> None:
    """The one-token request is answered after all retracted requests are recomputed; then as long again."""
    fake.replies["/server_info"] = 200, server_info(disable_overlap_schedule=True)
    fake.replies["/generate"] = 200, {}
    fake.delaying["/generate"] = recomputed = threading.Event()
    fake.completes = False

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy, swap_mode) as (updater, supervisor):
            await until(supervisor.serving.is_set)
            request = asyncio.create_task(supervisor.generate(make_ticket("0-0")))
            await until(lambda: "/generate" in fake.paths)
            first = await asyncio.to_thread(learner.publish, 0)
            updater.hint(first)
            await until(lambda: updater.version == first)
            began_s = time.monotonic()
            updater.hint(await asyncio.to_thread(learner.publish, 1))
            with contextlib.suppress(TimeoutError):
                await until(lambda: updater.version > first, 0.5 if waits else GUARD_S)
            assert (updater.version == first) == waits
            took_s = time.monotonic() - began_s
            recomputed.set()
            await until(lambda: updater.version > first)
            assert time.monotonic() - began_s > 2 * took_s or not waits
            request.cancel()

    run(scenario)


def test_without_requests_in_flight_the_next_swap_does_not_wait(
    learner: Learner, fake: FakeSglang, redis_url: str, keys: Keys, demo_policy: Path
) -> None:
    first = learner.publish(0)

    async def scenario() -> None:
        async with updating(redis_url, keys, fake, demo_policy) as (updater, _):
            await until(lambda: updater.version == first)
            updater.hint(await asyncio.to_thread(learner.publish, 1))
            await until(lambda: updater.version == first + 1)
            assert "/generate" not in fake.paths

    run(scenario)
