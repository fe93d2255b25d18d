"""The real SGLang with one process stopped: it exists, but does not answer."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_group
from headrace.generation.engine.server import EngineServer
from tests.support.guard import GUARD_S
from tests.support.replicas import Learner, a_learner, run, running_replica, until

SILENCE_S = 5.0


@pytest.fixture
def learner(tmp_path: Path, client: redis.Redis, keys: Keys, demo_policy: Path) -> Iterator[Learner]:
    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        yield learner


@pytest.fixture
def running_server(engine_server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> EngineServer:
    """The session's engine, which is already running at the supervisor's first start."""
    start = engine_server.start

    async def start_unless_it_runs(model_path: str | Path, weight_version: int | None) -> None:
        if not engine_server.is_alive:
            await start(model_path, weight_version)

    monkeypatch.setattr(engine_server, "start", start_unless_it_runs)
    return engine_server


@pytest.mark.slow
@pytest.mark.parametrize("part", ["http", "scheduler"])
def test_a_hung_sglang_is_restarted_on_the_verified_weights(
    part: str, learner: Learner, running_server: EngineServer, keys: Keys, demo_policy: Path, redis_url: str
) -> None:
    client = learner.store.client
    learner.publish(0)
    learner.publish(1)

    async def scenario() -> None:
        async with running_replica(redis_url, keys, running_server, demo_policy) as replica:
            await until(lambda: replica.status.state == "running")
            assert running_server._process is not None
            server = psutil.Process(running_server._process.pid)
            family = [server, *server.children(recursive=True)]
            [scheduler] = [process for process in family if "scheduler" in " ".join(process.cmdline())]
            os.kill((server if part == "http" else scheduler).pid, signal.SIGSTOP)
            stopped_at = time.monotonic()
            replica.supervisor.liveness.timeout_s = SILENCE_S
            learner.issue("0-0")
            await until(lambda: replica.heartbeat().groups_in_flight == 1)
            await until(lambda: not replica.supervisor.serving.is_set())
            detected_at = time.monotonic()
            replica.supervisor.liveness.timeout_s = GUARD_S
            assert replica.status.state == "quarantined" and "has not answered for" in replica.status.reason
            await until(lambda: replica.heartbeat().groups_in_flight == 0)
            assert client.xlen(keys.tickets) == 1 and client.xlen(keys.groups) == 0
            assert replica.waits.is_waiting(Reason.ENGINE_STARTING)
            await until(lambda: not any(process.is_running() for process in family))
            await until(lambda: replica.status.state == "running")
            detected_s, restart_s = detected_at - stopped_at, time.monotonic() - detected_at
            print(f"{part}: found after {detected_s:.1f} s, served again {restart_s:.1f} s later")
            await until(lambda: client.xlen(keys.groups) == 1)

    run(scenario)
    [(_, fields)] = client.xrange(keys.groups)
    group = decode_group(fields[b"group"])
    assert group.ticket.attempts == 0, "an engine failure does not count as an attempt"
    assert group.oldest_version == group.newest_version == 2
