"""An engine that dies, hangs, does not start or is only busy.

The engine is a scripted server, in a process of its own where the supervisor owns it; `test_engine_hangs` does the
same to the real SGLang.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from headrace.common.config import EngineConfig
from headrace.generation.engine.client import Engine, EngineError
from headrace.generation.engine.completions import Sample, SampledTurn, TurnRequest, Unconfirmed, to_completion
from headrace.generation.engine.server import POLL_S, EngineServer
from headrace.generation.engine.supervisor import EngineDown, EngineSupervisor
from tests.support.factories import SAMPLING, make_ticket
from tests.support.fake_sglang import FakeSglang, a_fake_sglang, sample
from tests.support.guard import GUARD_S
from tests.support.replicas import until

TURN = TurnRequest([5, 6, 7], SAMPLING, "0-7")
SILENCE_S = 1.0
"""The liveness timeout from when an engine is to be found silent. Until then it is `GUARD_S`."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.generation.engine.liveness.PROBE_PAUSE_S", 0.2)


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with a_fake_sglang() as server:
        yield server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineServer:
    """An engine server that is not started yet."""
    program = [sys.executable, "-m", "tests.support.fake_sglang"]
    monkeypatch.setattr("headrace.generation.engine.server.launch_command", lambda *given: [*program, str(given[4])])
    return EngineServer(EngineConfig(device="cpu", startup_timeout_s=GUARD_S), "float32", tmp_path / "sglang.log")


@contextlib.asynccontextmanager
async def supervising(
    engine: FakeSglang | EngineServer,
    busy_timeout_s: float = GUARD_S,
    swap_timeout_s: float = GUARD_S,
    liveness_timeout_s: float = GUARD_S,
) -> AsyncIterator[EngineSupervisor]:
    """Runs a supervisor; the block begins when the engine serves."""
    server = engine if isinstance(engine, EngineServer) else None
    client = Engine(engine.url, completion_timeout_s=GUARD_S, swap_timeout_s=swap_timeout_s)
    timeouts = {"liveness_timeout_s": liveness_timeout_s, "busy_timeout_s": busy_timeout_s}
    supervisor = EngineSupervisor(client, server, lambda: (Path("model"), 1), **timeouts)
    running = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(GUARD_S):
            await supervisor.serving.wait()
            yield supervisor
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.aclose()
        if server is not None:
            await server.stop()


async def script(supervisor: EngineSupervisor, *hanging: str, burn_s: float = 0.0) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=GUARD_S) as http:
        await http.post(f"{supervisor.engine.url}/script", json={"hanging": hanging, "burn_s": burn_s})


async def requests_in_flight(supervisor: EngineSupervisor, count: int) -> list[asyncio.Task[Any]]:
    """Tickets and turns, in turn."""
    asked = [
        supervisor.sample_turn(TURN._replace(rid=str(index)))
        if index % 2
        else supervisor.generate(make_ticket(f"0-{index}"))
        for index in range(count)
    ]
    requests: list[asyncio.Task[Any]] = [asyncio.ensure_future(one) for one in asked]
    await until(lambda: len(supervisor._requests) == count)
    return requests


@pytest.mark.parametrize("hit", [signal.SIGSTOP, signal.SIGKILL])
def test_an_engine_that_hangs_or_dies_is_restarted_and_its_requests_are_not_at_fault(
    server: EngineServer, hit: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with supervising(server) as supervisor:
            await script(supervisor, "/generate")
            requests = await requests_in_flight(supervisor, 3)
            assert server._process is not None
            pid, began_at = server._process.pid, time.monotonic()
            os.kill(pid, hit)
            if hit is signal.SIGSTOP:
                supervisor.liveness.timeout_s = SILENCE_S
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineDown] * 3
            if hit is signal.SIGSTOP:
                assert time.monotonic() - began_at >= SILENCE_S
                supervisor.liveness.timeout_s = GUARD_S
            if supervisor.incarnation == 1:  # on a busy machine it may be back by now
                assert not supervisor.serving.is_set() and "restarting it" in supervisor.problem
                with pytest.raises(EngineDown):
                    await supervisor.generate(make_ticket("0-9"))
                with pytest.raises(EngineDown):
                    await supervisor.parse_reply("x", [])
            await until(supervisor.serving.is_set)
            assert (
                supervisor.incarnation == 2
                and supervisor.problem == ""
                and server.is_alive
                and server._process.pid != pid
            )

    asyncio.run(scenario())
    expected = r"has not answered for \d+ s" if hit is signal.SIGSTOP else "exited with -9"
    assert re.search(f"the engine {expected}: restarting it", caplog.text)


def test_a_hung_engine_is_killed_without_sigterm(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[str] = []

    async def stop() -> None:
        stops.append("SIGTERM")

    async def scenario() -> None:
        async with supervising(server) as supervisor:
            with monkeypatch.context() as patch:
                patch.setattr(server, "stop", stop)
                await script(supervisor, "/health")
                supervisor.liveness.timeout_s = SILENCE_S
                await until(lambda: supervisor.incarnation == 2)
            assert stops == []

    asyncio.run(scenario())


def test_traffic_is_a_sign_of_life_without_probes(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with supervising(fake) as supervisor:
            supervisor.engine.calls.last_heard_at = time.monotonic() + GUARD_S
            monkeypatch.setattr("headrace.generation.engine.liveness.PROBE_AFTER", 0.0)
            await asyncio.sleep(10 * POLL_S)
            assert "/health" not in fake.paths
            supervisor.engine.calls.last_heard_at = time.monotonic()
            await until(lambda: fake.paths.count("/health") >= 2)  # probed when there is no traffic
            assert supervisor.incarnation == 1 and supervisor.problem == ""

    asyncio.run(scenario())


@pytest.mark.parametrize("is_probed", [False, True])
def test_a_long_swap_does_not_count_as_silence_but_after_it_the_probe_decides(
    fake: FakeSglang, tmp_path: Path, is_probed: bool
) -> None:
    fake.hanging = {"/update_weights_from_disk", "/health"}

    async def scenario() -> None:
        async with supervising(fake, swap_timeout_s=2 * SILENCE_S) as supervisor:
            fake.delaying["/pause_generation"] = pausing = threading.Event()
            swapping = asyncio.create_task(supervisor.engine.swap(tmp_path, 4))
            await until(lambda: "/pause_generation" in fake.paths)
            if is_probed:  # the probe is sent just before the load
                supervisor.liveness.timeout_s = SILENCE_S
                await until(lambda: "/health" in fake.paths)
            pausing.set()
            await until(lambda: "/update_weights_from_disk" in fake.paths)
            supervisor.liveness.timeout_s = SILENCE_S
            with pytest.raises(EngineError, match="no answer within"):
                await swapping
            assert supervisor.liveness.silent_s > 1.5 * SILENCE_S and supervisor.serving.is_set()
            loading = fake.paths[
                fake.paths.index("/update_weights_from_disk") : fake.paths.index("/continue_generation")
            ]
            assert "/health" not in loading
            await until(lambda: not supervisor.serving.is_set())

    asyncio.run(scenario())


def test_an_engine_that_hashes_its_weights_does_not_count_as_silent(fake: FakeSglang, tmp_path: Path) -> None:
    """On a GPU the scheduler first compiles a kernel for this."""
    fake.hanging = {"/weights_checker", "/health"}

    async def scenario() -> None:
        async with supervising(fake, swap_timeout_s=2 * SILENCE_S) as supervisor:
            swapping = asyncio.create_task(supervisor.engine.swap(tmp_path, 4))
            await until(lambda: "/weights_checker" in fake.paths)
            supervisor.liveness.timeout_s = SILENCE_S
            with pytest.raises(EngineError, match=r"/weights_checker at .* no answer within"):
                await swapping
            assert supervisor.liveness.silent_s > 1.5 * SILENCE_S and supervisor.serving.is_set()
            assert fake.paths.count("/health") <= 1, "one may have been sent since"
            await until(lambda: not supervisor.serving.is_set())

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_disk", "/continue_generation"])
def test_an_own_engine_that_hangs_in_a_swap_is_restarted_as_soon(
    server: EngineServer, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with supervising(server) as supervisor:
            await script(supervisor, path, "/health")
            send = supervisor.engine.calls.send

            def send_and_lose_patience(method: str, asked: str, body: Any, timeout_s: float | None) -> Awaitable[bytes]:
                if asked == path:
                    supervisor.liveness.timeout_s = SILENCE_S
                return send(method, asked, body, timeout_s)

            monkeypatch.setattr(supervisor.engine.calls, "send", send_and_lose_patience)
            with pytest.raises(EngineError, match=path):
                await supervisor.engine.swap(tmp_path, 4)
            await until(lambda: supervisor.incarnation == 2)

    asyncio.run(scenario())


def test_a_failed_swap_does_not_restart_an_engine_that_answers(fake: FakeSglang, tmp_path: Path) -> None:
    fake.hanging = {"/update_weights_from_disk"}

    async def scenario() -> None:
        async with supervising(fake, swap_timeout_s=2 * SILENCE_S) as supervisor:
            swapping = asyncio.create_task(supervisor.engine.swap(tmp_path, 4))
            await until(lambda: "/update_weights_from_disk" in fake.paths)
            supervisor.liveness.timeout_s = SILENCE_S
            with pytest.raises(EngineError, match="no answer within"):
                await swapping
            assert await supervisor.is_responsive(supervisor.incarnation)
            assert supervisor.serving.is_set() and supervisor.incarnation == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("busy_timeout_s", [GUARD_S, 2 * SILENCE_S])
def test_a_busy_engine_gets_more_time_but_not_unlimited(
    server: EngineServer, busy_timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.engine.liveness.BUSY_SHARE", 0.02)  # a loaded machine gives it little

    async def scenario() -> None:
        async with supervising(server, busy_timeout_s) as supervisor:
            await script(supervisor, "/health", burn_s=4 * SILENCE_S)
            supervisor.liveness.timeout_s = SILENCE_S
            await until(lambda: supervisor.liveness.silent_s > 3 * SILENCE_S or not supervisor.serving.is_set())
            assert supervisor.serving.is_set() == (busy_timeout_s == GUARD_S)
            await until(lambda: not supervisor.serving.is_set())  # it still hangs after computing

    asyncio.run(scenario())


def test_a_replica_that_was_stopped_itself_probes_again(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that was stopped finds its probe timed out, which is not the engine's fault."""
    monkeypatch.setattr("headrace.generation.engine.liveness.MIN_PROBE_S", 0.2)
    overslept: list[float] = []
    real = Engine.health

    async def oversleep(self: Engine, timeout_s: float) -> bool:
        if overslept:
            return await real(self, GUARD_S)
        overslept.append(timeout_s)
        await asyncio.sleep(timeout_s + 0.5)
        return False

    monkeypatch.setattr(Engine, "health", oversleep)

    async def scenario() -> None:
        async with supervising(fake, liveness_timeout_s=SILENCE_S) as supervisor:
            await until(lambda: supervisor.engine.last_heard_at > 0)
            assert overslept and supervisor.incarnation == 1

    asyncio.run(scenario())


def test_a_replica_waits_for_an_external_engine(fake: FakeSglang) -> None:
    fake.hanging = {"/health", "/generate"}

    async def scenario() -> None:
        async with supervising(fake) as supervisor:
            requests = await requests_in_flight(supervisor, 1)
            supervisor.liveness.timeout_s = SILENCE_S
            [outcome] = await asyncio.gather(*requests, return_exceptions=True)
            assert isinstance(outcome, EngineDown) and not supervisor.serving.is_set()
            assert re.fullmatch(r"the engine has not answered for \d+ s: waiting until it does", supervisor.problem)
            supervisor.liveness.timeout_s = GUARD_S
            fake.hanging = set()
            await until(supervisor.serving.is_set)
            assert supervisor.problem == "" and supervisor.incarnation == 2

    asyncio.run(scenario())


def test_an_error_counts_against_the_ticket_only_if_the_engine_still_answers(fake: FakeSglang) -> None:
    fake.replies["/generate"] = (500, {"error": "no"})

    async def scenario() -> None:
        async with supervising(fake) as supervisor:
            with pytest.raises(EngineError, match="ticket 0-0: /generate answered 500"):
                await supervisor.generate(make_ticket())
            fake.replies["/health"] = (503, {})
            with pytest.raises(EngineDown, match="ticket 0-0: /generate answered 500"):
                await supervisor.generate(make_ticket())
            with pytest.raises(EngineDown, match="turn 0-7: /generate answered 500"):
                await supervisor.sample_turn(TURN)
            assert supervisor.serving.is_set(), "known before the silence has lasted long enough to act"

    asyncio.run(scenario())


def test_an_error_of_an_earlier_incarnation_does_not_count_against_the_ticket(fake: FakeSglang) -> None:
    async def scenario() -> None:
        async with supervising(fake) as supervisor:
            assert await supervisor.is_responsive(supervisor.incarnation)
            assert not await supervisor.is_responsive(supervisor.incarnation - 1)

    asyncio.run(scenario())


DIES = "import sys; print('cannot allocate the cache', file=sys.stderr); sys.exit(7)"


def programs(monkeypatch: pytest.MonkeyPatch, *sources: str | None) -> list[int]:
    """The engine's starts run these programs, None for one that serves; returns the list of the starts."""
    starts: list[int] = []

    def command(*given: object) -> list[str]:
        source = sources[min(len(starts), len(sources) - 1)]
        starts.append(1)
        return [
            sys.executable,
            *(["-m", "tests.support.fake_sglang", str(given[4])] if source is None else ["-c", source]),
        ]

    monkeypatch.setattr("headrace.generation.engine.server.launch_command", command)
    return starts


def test_a_failed_start_is_retried(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = programs(monkeypatch, DIES, None)
    monkeypatch.setattr("headrace.generation.engine.supervisor.START_PAUSES_S", (0.3, 0.3))

    async def scenario() -> None:
        async with supervising(server) as supervisor:
            assert len(starts) == 2 and supervisor.problem == ""

    asyncio.run(scenario())


def test_repeated_failed_starts_raise_with_the_end_of_the_log(
    server: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = programs(monkeypatch, DIES)
    monkeypatch.setattr("headrace.generation.engine.supervisor.START_PAUSES_S", (0.3, 0.3))
    problems: list[str] = []

    async def scenario() -> None:
        supervisor = EngineSupervisor(
            Engine(server.url), server, lambda: (Path("m"), 1), liveness_timeout_s=GUARD_S, busy_timeout_s=GUARD_S
        )
        running = asyncio.create_task(supervisor.run())
        while not running.done():
            problems.append(supervisor.problem)
            await asyncio.sleep(0.05)
        await running

    with pytest.raises(EngineError, match=r"(?s)exited with 7 .*cannot allocate the cache"):
        asyncio.run(scenario())
    assert len(starts) == 3
    assert any("the engine does not start: SGLang exited with 7" in problem for problem in problems), "while it waits"


def test_a_cancelled_start_leaves_no_process(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")

    async def scenario() -> None:
        supervisor = EngineSupervisor(
            Engine(server.url), server, lambda: (Path("m"), 1), liveness_timeout_s=GUARD_S, busy_timeout_s=GUARD_S
        )
        running = asyncio.create_task(supervisor.run())
        await until(lambda: server.is_alive)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert not server.is_alive

    asyncio.run(scenario())


def test_unverified_weights_do_not_count_against_the_request(fake: FakeSglang, tmp_path: Path) -> None:
    fake.replies["/generate"] = (200, [sample()] * make_ticket().num_completions)

    async def scenario() -> None:
        async with supervising(fake) as supervisor:
            await supervisor.engine.swap(tmp_path, 4)
            fake.fails_halfway = True
            with pytest.raises(EngineError, match="Rolling back"):
                await supervisor.engine.swap(tmp_path, 5)
            with pytest.raises(EngineDown, match="may hold other weights than it reports"):
                await supervisor.generate(make_ticket())
            with pytest.raises(EngineDown, match="may hold other weights than it reports"):
                await supervisor.sample_turn(TURN)
            turn = SampledTurn(to_completion(msgspec.convert(sample(), Sample)), 0, Unconfirmed(frozenset({5}), 0))
            with pytest.raises(EngineDown, match="has not been confirmed"):
                await supervisor.wait_until_confirmed([turn])
            assert supervisor.serving.is_set()

    asyncio.run(scenario())
