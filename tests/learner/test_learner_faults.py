"""A learner whose disk, Redis, epoch or work goes away in the middle of a run, on a recording in this process."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.common.process.waiting import Reason
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.learner import loop as loop_module
from headrace.learner.checkpoints.checkpoint import CheckpointError, find_newest, save_checkpoint
from headrace.learner.commands.audit import audit
from headrace.learner.intake import intake as intake_module
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.loop import Loop
from headrace.learner.stages import checkpointing
from headrace.learner.stages.wait_deadlines import Starved
from headrace.learner.store.fenced_redis import Fenced, RedisLost
from headrace.learner.store.store import LearnerStore
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.replay import ROOT, STEPS, assemble_loop, end, state_of, trained


@pytest.fixture(scope="module")
def undisturbed(recording: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    loop = assemble_loop(folder, connect(redis_url), Keys(f"undisturbed-{os.getpid()}"), recording)
    assert loop.run()
    end(loop)
    return folder


@pytest.fixture
def loop(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Loop]:
    found = assemble_loop(tmp_path, client, keys, recording)
    yield found
    end(found)


def after_step(loop: Loop, number: int, act: Any) -> None:
    """Does `act` between that step's publication and its record."""
    publish = loop._publish

    def publish_and_act(num_groups: int = 0) -> None:
        publish(num_groups)
        loop.publisher.wait()
        if loop.progress.step == number:
            act()

    loop._publish = publish_and_act  # type: ignore[method-assign]


def wait_for_checkpoints(loop: Loop) -> None:
    """Each is over, in one way or the other, before the next step."""
    begin = loop.checkpointer.begin

    def begin_and_wait() -> None:
        begin()
        loop.checkpointer.wait()

    loop.checkpointer.begin = begin_and_wait  # type: ignore[method-assign]


def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    loop: Loop, client: redis.Redis, keys: Keys, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def save(*arguments: Any) -> Path:
        if len(refused) < 3:
            refused.append(loop.progress.step)
            raise CheckpointError("No space left on device")
        if len(refused) == 3:
            refused.append(loop.progress.step)
            assert loop.waits.status()[0]["reason"] == Reason.CHECKPOINT_FAILING
            assert "No space left" in loop.waits.describe()
        return save_checkpoint(*arguments)

    monkeypatch.setattr(checkpointing, "save_checkpoint", save)
    wait_for_checkpoints(loop)
    assert loop.run()
    assert refused == [2, 3, 4, 5], "tried again after every step"
    assert not loop.waits.status()
    assert state_of(tmp_path) == state_of(undisturbed)
    assert audit(client, keys, tmp_path).violations == []


def test_a_disk_that_stays_full_ends_the_learner_with_the_reason(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> Path:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(checkpointing, "save_checkpoint", save)
    monkeypatch.setattr(checkpointing, "RETRY_S", 0.01)
    learner = loop.config.learner.model_copy(update={"starvation_deadline_s": 0.05})
    loop.live_config.config = loop.config.model_copy(update={"learner": learner})
    with pytest.raises(Starved, match=r"the checkpoint cannot be written for .*No space left"):
        loop.run()


def test_a_learner_that_was_replaced_writes_nothing_more(
    loop: Loop, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    wait_for_checkpoints(loop)
    after_step(loop, 3, lambda: LearnerStore(client, keys))
    with pytest.raises(Fenced):
        loop.run()
    found = find_newest(tmp_path / "checkpoints")
    assert found is not None and found[0].step == 2
    assert len(trained(tmp_path)) == 2, "the third step was never recorded"
    assert audit(client, keys, tmp_path).violations == []


def test_when_redis_loses_everything_the_run_goes_on_from_its_checkpoint(
    loop: Loop, recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path, undisturbed: Path
) -> None:
    def lose() -> None:
        client.delete(*client.keys(keys.epoch.removesuffix("epoch").replace("[", "\\[") + "*"))

    wait_for_checkpoints(loop)
    after_step(loop, 5, lose)
    with pytest.raises(RedisLost):
        loop.run()
    again = assemble_loop(tmp_path, client, keys, recording)
    assert again.progress.step == 4 and again.store.epoch == 2
    in_stream: list[int] = []
    take_in = again.intake._take_in

    def look_and_take_in(*arguments: Any) -> None:
        in_stream.append(client.xlen(keys.groups))
        take_in(*arguments)

    again.intake._take_in = look_and_take_in  # type: ignore[assignment,method-assign]
    assert again.run()
    assert 0 < in_stream[2] <= again.config.learner.max_outstanding_groups, "admission counts none of what is lost"
    end(again)
    assert trained(tmp_path) == trained(undisturbed)
    assert state_of(tmp_path) == state_of(undisturbed)
    found = audit(client, keys, tmp_path)
    assert found.violations == []
    assert any("Redis lost everything once: the run went on from step 4" in note for note in found.notes)


def test_a_start_after_a_crash_between_a_checkpoint_and_its_settlement_trains_nothing_twice(
    loop: Loop, recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path, undisturbed: Path
) -> None:
    settle = loop.store.settle

    def settle_or_die(*arguments: Any, **options: Any) -> None:
        found = find_newest(tmp_path / "checkpoints")
        if found is not None and found[0].step == 4:
            raise KeyboardInterrupt
        settle(*arguments, **options)

    loop.store.settle = settle_or_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    again = assemble_loop(tmp_path, client, keys, recording)
    assert again.progress.step == 4
    assert again.run()
    end(again)
    assert trained(tmp_path) == trained(undisturbed) and len(trained(tmp_path)) == STEPS
    assert audit(client, keys, tmp_path).violations == []


def test_a_learner_that_nobody_serves_says_so_and_ends(redis_url: str, keys: Keys, tmp_path: Path) -> None:
    run = keys.epoch.partition("{")[2].partition("}")[0]
    command = [sys.executable, "-m", "headrace.learner", "--config", "configs/tiny-cpu.yaml", "--run", run]
    ended = subprocess.run(
        [*command, "--runs-folder", str(tmp_path), "--set", "learner.starvation_deadline_s=0.5"],
        cwd=ROOT,
        env=os.environ | {"HEADRACE_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert ended.returncode == 4, ended.stderr
    assert "no live replica for " in ended.stderr
    said = connect(redis_url).hgetall(keys.learner)
    assert said[b"phase"] == b"starved" and b"no live replica" in said[b"reason"]


def test_a_run_that_is_scaled_to_0_waits_without_a_deadline(
    loop: Loop, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ticket is answered meanwhile; the learner starves only once replicas are wanted again."""
    monkeypatch.setattr(loop.intake.source, "issue", lambda *_: IssueResult([]))
    monkeypatch.setattr(intake_module, "CONTROL_POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(loop_module, "WAIT_POLL_S", 0.01)
    learner = loop.config.learner.model_copy(update={"starvation_deadline_s": 0.2})
    loop.live_config.config = loop.config.model_copy(update={"learner": learner})
    client.hset(keys.control, "desired_replicas", 0)
    loop.intake.poll_control_state()
    ends: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:  # noqa: BLE001 - looked at below
            ends.append(error)

    running = threading.Thread(target=run)
    running.start()
    until(lambda: any(wait["for_s"] > 0.4 for wait in loop.waits.status()), "a long wait", loop.waits.status)
    assert not ends and loop.waits.describe().startswith("paused: generation is scaled to 0 replicas for ")
    client.hdel(keys.control, "desired_replicas")
    running.join(GUARD_S)
    assert len(ends) == 1 and isinstance(ends[0], Starved)
    assert loop.waits.describe().startswith("not enough groups")


def test_the_adviser_is_told_how_the_learner_spends_its_time(loop: Loop, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    observe = loop.reporter.adviser.observe

    def listen(waited_s: float, worked_s: float, *others: Any, **named: Any) -> Any:
        told.append((waited_s, worked_s))
        return observe(waited_s, worked_s, *others, **named)

    loop.reporter.adviser.observe = listen  # type: ignore[method-assign]
    assert loop.run()
    rows = rows_of(tmp_path, "step")
    waited_s, worked_s = (sum(part) for part in zip(*told, strict=True))
    assert waited_s >= sum(row["wait_s"] for row in rows) * 0.9
    assert worked_s >= sum(row["step_s"] - row["wait_s"] for row in rows)
    assert waited_s + worked_s <= loop.progress.wall_s + 1
    assert sum(worked > 0 for _, worked in told) == STEPS


def test_the_advice_is_published_and_outlives_the_learner(
    loop: Loop, recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    from headrace.learner.status import learner_status

    assert loop.run()
    said = client.hgetall(keys.learner)
    assert (said[b"advised_replicas"], said[b"advice"]) == (b"1", b"nothing has been measured yet")
    for stands, expected in ((b"5", 5), (b"many", 1)):
        client.hset(keys.learner, "advised_replicas", stands)
        client.hset(keys.control, "desired_replicas", 2)
        again = assemble_loop(tmp_path, client, keys, recording)
        again.intake.poll_control_state()
        status = learner_status(again, "x")
        assert (status["advised_replicas"], status["desired_replicas"]) == (expected, 2)
        end(again)


def test_the_status_needs_no_redis(loop: Loop) -> None:
    """While a command hangs in an outage, `/status` answers from memory."""
    from headrace.learner.status import learner_status

    answers: list[dict[str, Any]] = []
    loop.store.client.connection_pool.disconnect()
    loop.waits.note(Reason.REDIS_UNREACHABLE, "127.0.0.1:1: refused", 300.0)
    with loop.intake._lock:  # as the thread does while a command is tried again
        asking = threading.Thread(target=lambda: answers.append(learner_status(loop, "x")))
        asking.start()
        asking.join(GUARD_S)
    assert answers and answers[0]["waits"][0]["reason"] == "redis_unreachable"
