"""Recordings: what was recorded comes back, and a replay ends bit for bit the same, however often it is killed."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from safetensors.torch import load_file

from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.learner.commands.audit import audit
from headrace.learner.commands.record import follow
from headrace.learner.intake.recordings import Recording
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from tests.support.commits import queue
from tests.support.factories import make_group
from tests.support.guard import GUARD_S
from tests.support.replay import ROOT, STEPS, assemble_loop, end, state_of, trained


class Killed(BaseException):
    """In place of SIGKILL, at one Redis command of the learner."""


class Mortal(redis.Redis):  # type: ignore[misc]
    """Dies at a command, before it reaches Redis or after, when its answer is lost; and stays dead."""

    def arm(self, countdown: int, is_answer_lost: bool) -> "Mortal":
        self.countdown, self.is_answer_lost = countdown, is_answer_lost
        return self

    def execute_command(self, *arguments: object, **options: object) -> object:
        self.countdown -= 1
        if self.countdown < 0 or (self.countdown == 0 and not self.is_answer_lost):
            raise Killed
        answer = super().execute_command(*arguments, **options)
        if self.countdown <= 0:
            raise Killed
        return answer


def live(folder: Path, client: redis.Redis, keys: Keys, recording: Path) -> bool:
    """One life of a learner; whether it got to the end."""
    loop = None
    try:
        loop = assemble_loop(folder, client, keys, recording)
        return loop.run()
    except Killed:
        return False
    finally:
        if loop is not None:
            end(loop)


@pytest.fixture(scope="module")
def undisturbed(recording: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert live(folder, connect(redis_url), Keys("undisturbed"), recording)
    return folder


def test_a_recording_is_trained_once_in_its_order(undisturbed: Path, redis_url: str) -> None:
    tickets = [name for step in trained(undisturbed) for name in step]
    assert len(tickets) == len(set(tickets)) == 4 * STEPS
    assert "0-0" not in tickets, "a uniform group is not trained"
    found = audit(connect(redis_url), Keys("undisturbed"), undisturbed)
    assert found.violations == [] and found.counts["trained"] == 4 * STEPS and found.counts["uniform"] > 3


def test_a_learner_that_is_killed_again_and_again_ends_bit_for_bit_the_same(
    recording: Path, undisturbed: Path, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    rng = random.Random(11)
    num_deaths = 0
    while True:
        # Some commands go out by the clock, so a slow machine sends more a step: lives get longer until one arrives.
        longest = 55 + 5 * num_deaths
        client = Mortal.from_url(redis_url).arm(rng.randrange(1, longest), rng.random() < 0.5)
        if live(tmp_path, client, keys, recording):
            break
        num_deaths += 1
        if connect(redis_url).exists(keys.epoch):
            assert audit(connect(redis_url), keys, tmp_path).violations == []
    assert num_deaths >= 3, "the test must kill it to say anything"
    assert trained(tmp_path) == trained(undisturbed)
    assert state_of(tmp_path) == state_of(undisturbed)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_bit(
    recording: Path, undisturbed: Path, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    run = keys.epoch.partition("{")[2].partition("}")[0]
    command = [sys.executable, "-m", "headrace.learner", "--replay", str(recording), "--run", run]
    environment = os.environ | {"HEADRACE_REDIS_URL": redis_url}
    rows = tmp_path / run / "metrics.jsonl"

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--runs-folder", str(tmp_path)], cwd=ROOT, env=environment)

    for step in (1, 4):
        process = begin()
        wait_until(lambda: rows.exists() and f'"step": {step},' in rows.read_text(), process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert begin().wait(GUARD_S) == 0
    assert trained(tmp_path / run) == trained(undisturbed)
    assert state_of(tmp_path / run) == state_of(undisturbed)
    saved = load_file(tmp_path / run / "policy" / "model.safetensors")
    final = state_of(undisturbed)
    assert {name: tensor.numpy().tobytes() for name, tensor in saved.items()} == {
        name: final[f"master.{name}"] for name in saved
    }


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Polls; fails when the process ends first."""
    pause = threading.Event()
    while not condition():
        assert process.poll() is None, f"the learner ended with {process.returncode}"
        pause.wait(0.01)


def test_what_replicas_commit_is_recorded_in_order_and_once(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    client.set(keys.config, '{"seed": 3}')
    client.hset(keys.versions, mapping={"1": 0, "2": 1})
    client.hset(keys.learner, "phase", "finished")
    payloads = [encode(make_group(f"0-{place}")) for place in range(5)]
    for place in (3, 1):
        queue(client, keys, f"0-{place}", payloads[place])
    output = tmp_path / "recording.msgpack"
    assert follow(client, keys, "x", output, threading.Event()) == 2
    with output.open("ab") as file:
        file.write(b"\x40\x00\x00\x00half a frame")
    queue(client, keys, "0-4", payloads[4])
    assert follow(client, keys, "x", output, threading.Event()) == 3
    recording = Recording(output)
    assert (recording.run, recording.config, recording.version_steps) == ("x", {"seed": 3}, {1: 0, 2: 1})
    assert recording.groups(range(3)) == [(f"0-{place}", payloads[place]) for place in (3, 1, 4)]


def test_a_recorder_says_what_it_came_too_late_for(
    client: redis.Redis, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set(keys.config, "{}")
    client.hset(keys.learner, "phase", "stopped")
    entry_id = queue(client, keys, "0-0", b"x")
    client.xdel(keys.groups, entry_id)
    assert follow(client, keys, "x", tmp_path / "r", threading.Event()) == 0
    assert f"groups up to {entry_id} have left Redis" in capsys.readouterr().err


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"\x03\x00\x00\x00abc")
    with pytest.raises(ValueError, match="not a recording"):
        Recording(tmp_path / "r")
    (tmp_path / "r").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a recording"):
        Recording(tmp_path / "r")


def test_recorded_groups_are_added_once(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    store.add_groups([("0-0", b"a"), ("0-1", b"b")], Cursor(0, 2))
    store.add_groups([("0-1", b"b"), ("0-2", b"c")], Cursor(0, 3))
    assert [entry.ticket_id for entry in store.read(10, 0.1)] == ["0-0", "0-1", "0-2"]
    assert store.cursor() == Cursor(0, 3)
