"""`learner.num_ranks`: the learner's process starts the ranks and stands for the whole learner."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.learner.commands.audit import audit
from tests.support.guard import GUARD_S
from tests.support.replay import ROOT, STEPS, make_recording, trained

STARTER = """
import sys
from headrace.learner.distributed import launch
launch.EXIT_GRACE_S = 0.2
sys.exit(launch.run_ranks(2, [sys.executable, "-c", sys.argv[1]]))
"""
RANK = """
import os, pathlib, signal, sys
rank = os.environ["RANK"]
def end(*_):
    pathlib.Path("ended-" + rank).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
told = [str(os.getpid()), *(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))]
pathlib.Path("aside-" + rank).write_text(" ".join(told))
os.rename("aside-" + rank, "rank-" + rank)
while not (rank == "0" and os.path.exists("end")):
    signal.sigtimedwait([], 0.05)
sys.exit(4)
"""


class Starter:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-c", STARTER, RANK]
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def told(self, rank: int) -> list[str]:
        """The rank's process id and its environment variables, once it has written them."""
        path, deadline = self.folder / f"rank-{rank}", time.monotonic() + GUARD_S
        while not path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        return path.read_text().split()

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(int(self.told(rank)[0])) for rank in range(2)]


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    found = Starter(tmp_path)
    yield found
    found.process.kill()
    found.process.wait()


def test_each_rank_knows_its_number_and_rank_0_decides_the_exit_code(starter: Starter, tmp_path: Path) -> None:
    first, second = starter.told(0), starter.told(1)
    assert first[1:4] == ["2", "0", "127.0.0.1"] and second[1:4] == ["2", "1", "127.0.0.1"]
    assert first[4] == second[4] and int(first[4]) > 0
    ranks = starter.ranks()
    (tmp_path / "end").touch()
    assert starter.process.wait(GUARD_S) == 4
    assert not [rank for rank in ranks if rank.is_running()]


def test_only_rank_0_gets_the_signal_to_end(starter: Starter, tmp_path: Path) -> None:
    starter.ranks()
    starter.process.terminate()
    assert starter.process.wait(GUARD_S) == 0
    assert (tmp_path / "ended-0").exists() and not (tmp_path / "ended-1").exists()


def test_no_rank_outlives_the_process_that_started_it(starter: Starter) -> None:
    ranks = starter.ranks()
    starter.process.kill()
    assert not psutil.wait_procs(ranks, GUARD_S)[1]


def learner(recording: Path, folder: Path, keys: Keys, redis_url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "headrace.learner", "--replay", str(recording), "--run", keys.run]
    chosen = ["--set", "learner.num_ranks=2", "--set", f"learner.rank_deadline_s={GUARD_S:g}"]
    environment = os.environ | {"HEADRACE_REDIS_URL": redis_url}
    return subprocess.Popen([*command, "--runs-folder", str(folder), *chosen], cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["asked to stop", "a rank is killed"])
def test_a_learner_on_two_ranks_stops_and_resumes_like_one_process(
    redis_url: str, client: redis.Redis, keys: Keys, tmp_path: Path, what: str
) -> None:
    recording, rows = make_recording(tmp_path / "recording.msgpack"), tmp_path / keys.run / "metrics.jsonl"
    process = learner(recording, tmp_path, keys, redis_url)
    try:
        deadline = time.monotonic() + GUARD_S
        while not (rows.exists() and '"step": 3,' in rows.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        ranks[1].kill() if what == "a rank is killed" else process.terminate()
        assert process.wait(GUARD_S) == (1 if what == "a rank is killed" else 0)
        assert not [rank for rank in ranks if rank.is_running()]
        process = learner(recording, tmp_path, keys, redis_url)
        assert process.wait(GUARD_S) == 0
    finally:
        process.kill()
        process.wait()
    assert len(trained(tmp_path / keys.run)) == STEPS
    assert audit(client, keys, tmp_path / keys.run).violations == []
