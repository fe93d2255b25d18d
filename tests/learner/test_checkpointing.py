"""Checkpoints beside the loop: written while steps go on, one at a time, and not more often than they are good for."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.common.process.atomic_files import FileEntry
from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.learner.checkpoints.checkpoint import find_newest
from headrace.learner.checkpoints.record import checkpoint_folders, read_record
from headrace.learner.commands.audit import audit
from headrace.learner.distributed.state_files import read_state
from headrace.learner.loop import Loop
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.replay import STEPS, assemble_loop, end


@pytest.fixture
def loop(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Loop]:
    found = assemble_loop(tmp_path, client, keys, recording)
    yield found
    end(found)


class Gate:
    """Before the first checkpoint is written."""

    def __init__(self, loop: Loop) -> None:
        self.is_open, self.reached = threading.Event(), threading.Event()
        self._write = loop.trainer.write_copy
        loop.trainer.write_copy = self._wait_and_write  # type: ignore[method-assign]

    def _wait_and_write(self, folder: Path) -> dict[str, FileEntry]:
        self.reached.set()
        assert self.is_open.wait(GUARD_S)
        return self._write(folder)


def test_steps_are_taken_while_a_checkpoint_is_written_and_it_is_of_its_own_step(
    loop: Loop, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    gate, states = Gate(loop), list[dict[str, bytes]]()
    copy_state, update_guard = loop.trainer.copy_state, loop._update_guard

    def note_and_copy() -> None:
        states.append(
            {name: t.detach().numpy().tobytes() for name, t in loop.trainer.optimizer.state_tensors().items()}
        )
        copy_state()

    def update_guard_and_open(row: Any) -> None:
        update_guard(row)
        if loop.progress.step == 5:
            assert not checkpoint_folders(tmp_path / "checkpoints") and loop.checkpointer.is_busy
            gate.is_open.set()
            loop.checkpointer.wait()
            (first,) = checkpoint_folders(tmp_path / "checkpoints")
            record = read_record(first)
            found = read_state(first, sorted(record.files))
            assert record.step == 2
            assert {name: found[name].numpy().tobytes() for name in states[0]} == states[0]
            assert sum(one.state == "trained" for one in record.settlements) == 8, "of two steps, though five are over"

    loop.trainer.copy_state = note_and_copy  # type: ignore[method-assign]
    loop._update_guard = update_guard_and_open  # type: ignore[method-assign]
    assert loop.run()
    assert gate.reached.is_set() and len(rows_of(tmp_path, "step")) == STEPS
    steps = [read_record(folder).step for folder in checkpoint_folders(tmp_path / "checkpoints")]
    assert steps == [6, 6], "that of step 5, which stood in for 4's, is gone"
    assert len(states) == 4 and audit(client, keys, tmp_path).violations == []


def test_a_checkpoint_that_is_ordered_while_one_is_written_is_one_more(loop: Loop, tmp_path: Path) -> None:
    gate = Gate(loop)
    loop.publish_first()
    loop.checkpointer.begin()
    assert gate.reached.wait(GUARD_S)
    desired = loop.intake.control_state.desired_state
    loop.intake.control_state.desired_state = desired._replace(checkpoints=desired.checkpoints + 1)
    for _ in range(2):
        loop._apply_desired_state()
    assert not checkpoint_folders(tmp_path / "checkpoints"), "answered by none that was begun before"
    gate.is_open.set()
    loop.checkpointer.wait()
    for _ in range(2):
        loop._apply_desired_state()
    loop.checkpointer.wait()
    assert len(checkpoint_folders(tmp_path / "checkpoints")) == 2


def test_a_stop_waits_for_the_checkpoint_that_is_written_and_writes_its_own(loop: Loop, tmp_path: Path) -> None:
    gate = Gate(loop)
    running = threading.Thread(target=loop.run, daemon=True)
    running.start()
    until(lambda: loop.progress.step >= 3, "a step beside the checkpoint")
    loop.switches.stop.set()
    until(lambda: loop.waits.is_waiting(Reason.WAITING_FOR_CHECKPOINT), "the wait for it", loop.waits.status)
    gate.is_open.set()
    running.join(GUARD_S)
    assert not running.is_alive()
    found = find_newest(tmp_path / "checkpoints")
    assert found is not None and found[0].step == loop.progress.step


def waited(loop: Loop, num_s: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """When a learner that waits for so many seconds, and to which groups come that it cannot train, begins
    checkpoints."""
    begun, clock = list[int](), iter(range(1, num_s + 1))
    now = 0

    def tick(_: Reason) -> float:
        nonlocal now
        now = next(clock, num_s)
        loop.intake.settlement_log.unsettled_bytes += 1
        if now == num_s:
            loop.switches.stop.set()
        return now

    def begin() -> None:
        loop.checkpointer.is_due = False
        begun.append(now)

    monkeypatch.setattr(loop.wait_deadlines, "note_group_wait", tick)
    monkeypatch.setattr(loop.intake, "take_batch", lambda *_: None)
    monkeypatch.setattr(loop.checkpointer, "begin", begin)
    assert loop._wait_for_batch() is None
    loop.switches.stop.clear()
    return begun


def test_a_long_wait_is_used_for_one_checkpoint(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(loop, 300, monkeypatch) == [11]
    assert waited(loop, 9, monkeypatch) == []
    loop.checkpointer.last_duration_s = 20.0
    assert waited(loop, 300, monkeypatch) == [81], "only once the last one's time is a quarter of the wait's"
    assert waited(loop, 79, monkeypatch) == []


def test_what_the_disk_refused_is_tried_again_in_a_wait(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.checkpointer.is_due = True
    assert waited(loop, 30, monkeypatch) == [11]


def test_a_full_redis_is_relieved_as_long_as_that_helps(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.waits.note(Reason.REDIS_REFUSING, "OOM", 300.0)
    assert waited(loop, 45, monkeypatch) == [11, 22, 33, 44]
    loop.intake.settlement_log.unsettled_bytes, loop.intake.settlement_log.checkpointed = 0, []
    assert not loop.checkpointer.would_help(True), "there is nothing that could leave"
