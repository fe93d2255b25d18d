"""A replica joins with a Redis URL and a token in its environment; a missing or wrong one is reported in one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from headrace.common.config import RunConfig
from headrace.common.process.waiting import Waits
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_heartbeat
from headrace.generation.bootstrap import join
from headrace.launcher.run.redis_server import start_redis
from tests.support.fake_services import ROOT, until
from tests.support.fake_sglang import FakeSglang
from tests.support.guard import GUARD_S
from tests.support.replicas import a_learner

Start = Callable[..., "subprocess.Popen[str]"]
RUN = Keys("joined")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[str]:
    """A Redis without other tests' runs."""
    service, url = start_redis(tmp_path / "redis", tmp_path / "redis.log")
    yield url
    service.stop(5.0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a replica whose environment has no variables of Headrace except the given ones."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        command = [sys.executable, "-m", "headrace.generation", "--log-folder", str(tmp_path), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=ROOT, env=ours | environment, text=True, **pipes))  # type: ignore
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def begin_run(client: redis.Redis, keys: Keys, model: str, engine_url: str = "http://127.0.0.1:1") -> None:
    config = {
        "model": {"path": model, "dtype": "float32"},
        "task": {"name": "arithmetic"},
        "generation": {"engine": {"url": engine_url, "device": "cpu"}},
    }
    client.set(keys.config, RunConfig.model_validate(config).model_dump_json())


def test_a_url_and_a_token_are_enough(
    own_redis: str, start: Start, fake: FakeSglang, tmp_path: Path, demo_policy: Path
) -> None:
    """Two replicas with the same arguments get two names; each serves, and a SIGTERM ends it."""
    with connect(own_redis) as client, a_learner(client, RUN, tmp_path, demo_policy) as learner:
        learner.publish(0)
        begin_run(client, RUN, str(demo_policy), fake.url)
        first, second = [start(HEADRACE_REDIS_URL=own_redis, HEADRACE_TOKEN="token") for _ in range(2)]
        until(lambda: len(learner.store.replicas()) == 2, "two heartbeats")
        until(lambda: "running" in {one.state for one in learner.store.replicas()}, "one that runs")
        learner.issue("0-0", num_completions=2)
        until(lambda: client.xlen(RUN.groups) == 1, "a group")
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=GUARD_S)
            assert process.returncode == 0, output
        assert not learner.store.replicas(), "drained replicas delete their heartbeats"


def test_a_replica_is_named_after_its_host(own_redis: str, start: Start, demo_policy: Path, fake: FakeSglang) -> None:
    with connect(own_redis) as client:
        begin_run(client, RUN, str(demo_policy), fake.url)
        start(HEADRACE_REDIS_URL=own_redis, HEADRACE_TOKEN="token")
        until(lambda: bool(list(client.scan_iter(RUN.replicas + "*"))), "a heartbeat")
        (key,) = client.scan_iter(RUN.replicas + "*")
        name = decode_heartbeat(client.get(key)).replica
        assert name.startswith(f"{os.uname().nodename}-") and key.decode() == RUN.replica(name)


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        ((), {"HEADRACE_TOKEN": "t"}, "no Redis: expected the variable HEADRACE_REDIS_URL or --redis-url"),
        ((), {"HEADRACE_REDIS_URL": "redis://127.0.0.1:1"}, "no token: expected the variable HEADRACE_TOKEN or"),
        (("--name", "a b"), {}, "the replica's name 'a b' has characters that are whitespace"),
        (("--name", ""), {}, "the replica's name is empty"),
        (("--name", "a/b"), {}, "the replica's name has a '/'"),
        ((), {"HEADRACE_REDIS_URL": "127.0.0.1:1", "HEADRACE_TOKEN": "t"}, "the URL of Redis cannot be read"),
    ],
)
def test_what_is_missing_is_one_line(
    start: Start, arguments: tuple[str, ...], environment: dict[str, str], line: str
) -> None:
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 2 and output.count("\n") == 1, output
    assert output.startswith(f"headrace generation: {line}")


def test_of_several_runs_one_must_be_named(
    own_redis: str, monkeypatch: pytest.MonkeyPatch, demo_policy: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADRACE_TOKEN", "token")
    with connect(own_redis) as client:
        for name in ("one", "two"):
            begin_run(client, Keys(name), str(demo_policy))
        with pytest.raises(ValueError, match=r"this Redis has 2 runs \(one, two\): expected HEADRACE_RUN or --run"):
            join(own_redis, None, None, Waits())
        assert join(own_redis, "two", None, Waits()).keys.config == Keys("two").config
        begin_run(client, Keys("two"), str(tmp_path / "elsewhere"))
        with pytest.raises(ValueError, match=r"elsewhere': expected a folder with a config.json"):
            join(own_redis, "two", None, Waits())


def test_a_replica_does_not_wait_for_ever_for_a_run(own_redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TOKEN", "token")
    monkeypatch.setattr("headrace.common.bootstrap.JOIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr("headrace.common.bootstrap.POLL_S", 0.01)
    with pytest.raises(TimeoutError, match="no learner has begun any run within 0 s"):
        join(own_redis, None, None, Waits())
    with pytest.raises(TimeoutError, match="run 'absent' has no configuration in Redis"):
        join(own_redis, "absent", None, Waits())
