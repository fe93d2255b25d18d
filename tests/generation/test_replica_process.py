"""A replica as a process: after a signal it ends by itself, with all its processes, whatever else hangs. If it hangs
itself, its exit deadline ends it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.common.config import RunConfig
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_ticket
from headrace.generation.__main__ import EXIT_DEADLINE_S
from headrace.launcher.run.processes import Service
from headrace.launcher.run.redis_server import start_redis
from headrace.launcher.up import REPLICA_GRACE_S
from tests.support.fake_sglang import FakeSglang
from tests.support.guard import GUARD_S
from tests.support.replicas import Learner, a_learner

ROOT = Path(__file__).parents[2]
START = """
import sys
from headrace.generation import __main__, loop, ticket_processor
__main__.EXIT_DEADLINE_S = {exit_deadline_s}
loop.DRAIN_TIMEOUT_S = 0.2
{settings}
sys.exit(__main__.main())
"""
LOG_OPENING = """
def log_opening(event, arguments):
    if event == "open" and str(arguments[0]) == {path!r}:
        print("opening the file", flush=True)
sys.addaudithook(log_opening)
"""


class Process:
    """`python -m headrace.generation` and its log."""

    def __init__(
        self, redis_url: str, keys: Keys, folder: Path, settings: str = "", exit_deadline_s: float = GUARD_S
    ) -> None:
        """`settings` are statements that change its constants. Without them its exit deadline ends no test that
        passes."""
        self.log = folder / "replica.log"
        [run] = re.findall(r"\{(.*)\}", keys.config)
        environment = os.environ | {"HEADRACE_REDIS_URL": redis_url, "HEADRACE_TOKEN": "token"}
        start = START.format(exit_deadline_s=exit_deadline_s, settings=settings)
        command = [sys.executable, "-c", start, "--run", run, "--name", "a"]
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*command, "--log-folder", str(folder)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.psutil = psutil.Process(self.popen.pid)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + GUARD_S
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def until_logged(self, text: str) -> None:
        self.until(lambda: text in self.log.read_text())

    def family(self) -> list[Any]:
        return list(self.psutil.children(recursive=True))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends the process and returns its exit code; it must leave no process behind."""
        family = self.family()
        self.popen.send_signal(number)
        code = self.popen.wait(GUARD_S)
        _, left = psutil.wait_procs(family, timeout=GUARD_S)
        left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"{left}; {self.log.read_text()}"
        return code


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[tuple[Service, str]]:
    service, url = start_redis(tmp_path / "redis", tmp_path / "redis.log")
    yield service, url
    with contextlib.suppress(ProcessLookupError):
        os.kill(service.process.pid, signal.SIGCONT)
    service.stop(GUARD_S)


@contextlib.contextmanager
def replica(
    url: str,
    keys: Keys,
    folder: Path,
    model: Path,
    engine_url: str | None,
    is_published: bool = True,
    task: str = "arithmetic",
    **options: Any,
) -> Iterator[tuple[Process, Learner]]:
    """A replica in a run whose learner has started; it is killed when the block ends."""
    with connect(url) as client, a_learner(client, keys, folder, model) as learner:
        if is_published:
            learner.publish(0)
        config = {
            "model": {"path": str(model), "dtype": "float32"},
            "task": {"name": task},
            "generation": {"engine": {"url": engine_url, "device": "cpu"}},
        }
        client.set(keys.config, RunConfig.model_validate(config).model_dump_json())
        process = Process(url, keys, folder, **options)
        try:
            yield process, learner
        finally:
            process.popen.kill()
            process.popen.wait()


def test_a_missing_task_is_refused_in_one_line(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    with replica(redis_url, keys, tmp_path, demo_policy, fake.url, task="nowhere:Task") as (process, _):
        assert process.popen.wait(GUARD_S) == 2
    last = process.log.read_text().splitlines()[-1]
    assert last.startswith("headrace generation: ValueError: task 'nowhere:Task' cannot be imported: No module named")
    assert "expected a module beside the recipe, installed, or on PYTHONPATH" in last


def issue_one_in_flight(process: Process, learner: Learner, fake: FakeSglang) -> None:
    fake.hanging.add("/generate")
    learner.issue("0-0")
    process.until(lambda: "/generate" in fake.paths)


def test_tickets_in_flight_are_handed_back(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    patient = f"ticket_processor.SHUTDOWN_BUDGET_S = {GUARD_S}"
    with replica(redis_url, keys, tmp_path, demo_policy, fake.url, settings=patient) as (process, learner):
        issue_one_in_flight(process, learner, fake)
        client = learner.store.client
        process.until(lambda: client.exists(keys.replica("a")))
        assert process.end() == 0
        assert client.xpending(keys.tickets, "generation")["pending"] == 0
        [(_, fields)] = client.xrange(keys.tickets)
        assert decode_ticket(fields[b"ticket"]).attempts == 0
        assert not client.exists(keys.replica("a")), "a drained replica deletes its heartbeat"


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_an_unreachable_redis_does_not_delay_the_end(
    fault: str, own_redis: tuple[Service, str], keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    service, url = own_redis
    with replica(url, keys, tmp_path, demo_policy, fake.url) as (process, learner):
        issue_one_in_flight(process, learner, fake)
        service.process.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        assert process.end() == 0
        assert "ticket=0-0: cannot be handed back; its lease will expire" in process.log.read_text()


def test_a_swap_in_progress_is_left_with_generation_continued(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    fake.hanging.add("/update_weights_from_disk")
    with replica(redis_url, keys, tmp_path, demo_policy, fake.url) as (process, _):
        process.until(lambda: "/update_weights_from_disk" in fake.paths)
        assert process.end(signal.SIGINT) == 0
    assert fake.paths[-1] == "/continue_generation"


def test_an_engine_that_hangs_in_a_swap_does_not_delay_the_end(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    fake.hanging |= {"/update_weights_from_disk", "/continue_generation", "/abort_request", "/health"}
    with replica(redis_url, keys, tmp_path, demo_policy, fake.url) as (process, _):
        process.until(lambda: "/update_weights_from_disk" in fake.paths)
        assert process.end() == 0


@pytest.mark.slow
def test_an_engine_that_is_still_starting_is_stopped(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path
) -> None:
    with replica(redis_url, keys, tmp_path, demo_policy, None) as (process, _):
        process.until(lambda: any("sglang" in " ".join(child.cmdline()) for child in process.family()))
        assert process.end() == 0


def test_a_replica_that_cannot_end_exits_at_its_deadline(
    redis_url: str, keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    """A pipe without a writer blocks the event loop, as an unreachable network file system would."""
    fake.model_path = tmp_path / "model"
    fake.model_path.mkdir()
    file = fake.model_path / "model.safetensors"
    os.mkfifo(file)
    fake.serve_version("default")
    settings = LOG_OPENING.format(path=str(file))
    with replica(redis_url, keys, tmp_path, demo_policy, fake.url, settings=settings, exit_deadline_s=0.5) as (
        process,
        _,
    ):
        process.until_logged("opening the file")
        assert process.end() == 1
        assert "exiting now" in process.log.read_text()


def test_a_replica_can_be_ended_before_it_is_assembled(
    own_redis: tuple[Service, str], keys: Keys, tmp_path: Path, demo_policy: Path, fake: FakeSglang
) -> None:
    """Its Redis refuses writes, for which the assembly of its first part waits."""
    _, url = own_redis
    with replica(url, keys, tmp_path, demo_policy, fake.url) as (process, learner):
        learner.store.client.config_set("maxmemory", 1)
        process.until_logged("Redis refuses writes")
        assert process.end() == 0


def test_the_log_has_the_first_waits_but_not_the_password(
    own_redis: tuple[Service, str], keys: Keys, tmp_path: Path
) -> None:
    service, url = own_redis
    with connect(url) as client:
        client.config_set("requirepass", "sesame")
    process = Process(url.replace("//", "//:sesame@"), keys, tmp_path)
    try:
        process.until_logged("has no configuration in Redis: no learner has begun it")
        service.kill()
        process.until_logged("Redis unreachable")
        assert "sesame" not in " ".join(process.psutil.cmdline())
        assert process.end(signal.SIGINT) == 0
        assert "sesame" not in process.log.read_text()
    finally:
        process.popen.kill()
        process.popen.wait()


def test_a_replica_ends_before_the_launcher_kills_it() -> None:
    assert EXIT_DEADLINE_S < REPLICA_GRACE_S
