"""Ranks that die or freeze: the others notice within the deadline, torchrun restarts all, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from safetensors.torch import load_file

from headrace.common.http.addresses import free_port
from headrace.common.redis.keys import Keys
from headrace.learner.checkpoints.record import checkpoint_folders, read_record
from headrace.learner.commands.audit import audit
from tests.support.guard import GUARD_S
from tests.support.replay import ROOT, STEPS, make_recording, state_of, trained

DEADLINE_S = 4.0
pytestmark = pytest.mark.slow


class Started:
    """Ranks without torchrun: they end only by themselves."""

    def __init__(self, module: list[str], count: int) -> None:
        environment = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment["MASTER_PORT"] = str(free_port())
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*module: str, count: int = 2) -> Started:
        started.append(Started(list(module), count))
        return started[-1]

    yield begin
    for one in started:
        one.end()


def idle(start: Callable[..., Started], idle_s: float) -> list[subprocess.Popen[str]]:
    """Two ranks that have joined."""
    ranks = start("tests.support.idle_ranks", str(DEADLINE_S), str(idle_s)).ranks
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "imported\n"
    for rank in ranks:
        assert rank.stdin is not None
        print(file=rank.stdin, flush=True)
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "joined\n"
    return ranks


def test_a_rank_waits_beyond_the_deadline_while_rank_0_runs(start: Callable[..., Started]) -> None:
    leader, follower = idle(start, 3 * DEADLINE_S)
    assert leader.wait(GUARD_S) == follower.wait(GUARD_S) == 7


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_idle_ranks_notice_that_another_is_gone(
    start: Callable[..., Started], victim: int, number: signal.Signals
) -> None:
    ranks = idle(start, GUARD_S)
    ranks[victim].send_signal(number)
    other = ranks[1 - victim]
    assert other.wait(GUARD_S) == 1
    assert other.stdout is not None
    assert other.stdout.read().startswith("silence for" if victim == 0 else "a rank is lost")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return make_recording(tmp_path / "recording.msgpack")


def run_of(keys: Keys) -> str:
    return keys.epoch.partition("{")[2].partition("}")[0]


def until_step(rows: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not (rows.exists() and f'"step": {step},' in rows.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def torchrun(keys: Keys, redis_url: str, folder: Path, *learner: str) -> subprocess.Popen[str]:
    """A learner on two ranks, restarted once if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "--", "headrace.learner", "--run", run_of(keys), *learner]
    environment = os.environ | {"HEADRACE_REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--runs-folder", str(folder)], cwd=ROOT, env=environment, text=True)


def test_a_killed_rank_ends_the_others_and_the_job_resumes_from_its_checkpoint(
    recording: Path, redis_url: str, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    folder = tmp_path / run_of(keys)
    agent = torchrun(keys, redis_url, tmp_path, "--replay", str(recording))
    try:
        until_step(folder / "metrics.jsonl", 3, agent)
        ranks = {one.environ()["RANK"]: one for one in psutil.Process(agent.pid).children()}
        ranks["1"].kill()
        _, alive = psutil.wait_procs([ranks["0"]], timeout=GUARD_S)
        assert not alive, "rank 0 outlives rank 1"
        assert agent.wait(GUARD_S) == 0
    finally:
        agent.terminate()
        agent.wait()
    assert int(client.get(keys.epoch)) == 2, "it was started again, once"
    tickets = [name for step in trained(folder) for name in step]
    assert len(tickets) == len(set(tickets)) == 4 * STEPS
    assert audit(client, keys, folder).violations == []
    newest = read_record(checkpoint_folders(folder / "checkpoints")[-1])
    assert sorted(newest.files) == ["state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"]
    saved, state = load_file(folder / "policy" / "model.safetensors"), state_of(folder)
    assert {name: tensor.numpy().tobytes() for name, tensor in saved.items()} == {
        name.removeprefix("master."): content for name, content in state.items() if name.startswith("master.")
    }


def test_a_learner_with_a_final_exit_code_is_not_restarted(
    redis_url: str, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    settings = ("--set", "learner.starvation_deadline_s=0.5")
    agent = torchrun(keys, redis_url, tmp_path, "--config", "configs/tiny-cpu.yaml", *settings)
    try:
        assert agent.wait(GUARD_S) == 1
    finally:
        agent.terminate()
        agent.wait()
    assert client.hget(keys.learner, "phase") == b"starved"
    assert client.get(keys.epoch) == b"1"


def test_a_rank_that_freezes_in_a_step_ends_rank_0_within_the_deadline(
    start: Callable[..., Started], recording: Path, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    run, deadline_s = run_of(keys), 30
    learner = ["headrace.learner", "--replay", str(recording), "--run", run, "--runs-folder", str(tmp_path)]
    learner += ["--redis-url", redis_url, "--set", f"learner.rank_deadline_s={deadline_s}"]
    leader, follower = start(*learner).ranks
    until_step(tmp_path / run / "metrics.jsonl", 2, leader)
    follower.send_signal(signal.SIGSTOP)
    assert leader.wait(GUARD_S) == 1
