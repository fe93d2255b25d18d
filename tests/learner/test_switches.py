"""What is ordered of a learner in Redis or over HTTP: obeyed within a second, between steps, over restarts."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from headrace.common.config.hot_reload import hot_reloadable_values
from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import Settings, parse_desired_state
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.checkpoints.checkpoint import find_newest
from headrace.learner.checkpoints.record import CheckpointRecord, checkpoint_folders, read_record
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.loop import Loop
from headrace.learner.steering import live_config
from headrace.learner.steering import switches as switches_module
from headrace.learner.steering.switches import Switches
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.replay import STEPS, assemble_loop, end, make_config


@pytest.fixture
def loop(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Loop]:
    found = assemble_loop(tmp_path, client, keys, recording)
    yield found
    end(found)


def after_step(loop: Loop, number: int, act: Callable[[], Any]) -> None:
    """Does `act` at the end of that step, and has it seen before the next one."""
    mark_trained = loop.intake.mark_trained

    def mark_and_act(batch: Any) -> None:
        mark_trained(batch)
        if loop.progress.step == number:
            act()
            loop.intake.poll_control_state()

    loop.intake.mark_trained = mark_and_act  # type: ignore[method-assign]


@contextmanager
def running(loop: Loop) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield thread
    thread.join(GUARD_S)
    assert not thread.is_alive()


def events_of(client: redis.Redis, keys: Keys, kind: str) -> list[dict[str, Any]]:
    return [json.loads(f[b"event"]) for _, f in client.xrange(keys.events) if f[b"kind"] == kind.encode()]


def order_settings(client: redis.Redis, keys: Keys, version: int, **values: Any) -> None:
    named = {name.replace("__", "."): value for name, value in values.items()}
    client.hset(keys.control, "settings", json.dumps({"version": version, "values": named}))


def test_a_pause_in_redis_is_obeyed_until_it_is_withdrawn(loop: Loop, client: redis.Redis, keys: Keys) -> None:
    after_step(loop, 2, lambda: client.hset(keys.control, "paused", 1))
    with running(loop):
        until(lambda: loop.waits.describe().startswith("paused for "), "the pause")
        assert client.hget(keys.learner, "phase") == b"paused" and loop.progress.step == 2
        client.hdel(keys.control, "paused")
    assert loop.progress.step == STEPS


def test_a_pause_is_seen_by_a_learner_that_waits_for_groups(
    loop: Loop, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.intake.source, "issue", lambda *_: IssueResult([]))
    with running(loop):
        until(lambda: client.hget(keys.learner, "phase") == b"waiting", "the wait")
        client.hset(keys.control, "paused", 1)
        until(lambda: loop.waits.describe().startswith("paused for "), "the pause")
        assert client.hget(keys.learner, "phase") == b"paused"
        loop.switches.stop.set()


def test_no_ticket_is_issued_while_the_step_in_progress_ends(loop: Loop, client: redis.Redis, keys: Keys) -> None:
    loop.switches.pause()
    loop.intake.poll_once()
    assert client.xlen(keys.groups) == 0
    loop.switches.resume()
    loop.intake.poll_once()
    assert client.xlen(keys.groups) > 0


def test_orders_outlive_the_learner(
    loop: Loop, client: redis.Redis, keys: Keys, recording: Path, tmp_path: Path
) -> None:
    client.hset(keys.control, mapping={"paused": 1, "checkpoints": 3})
    again = assemble_loop(tmp_path, client, keys, recording)
    assert again.switches.paused.is_set() and not loop.switches.paused.is_set()
    with running(again):
        until(lambda: client.hget(keys.learner, "phase") == b"paused", "the pause")
        assert checkpoint_folders(tmp_path / "checkpoints") == [], "asked for before this learner"
        client.hincrby(keys.control, "checkpoints", 1)
        until(lambda: len(checkpoint_folders(tmp_path / "checkpoints")) == 1, "a checkpoint while it is paused")
        again.switches.stop.set()
    end(again)


def test_a_stop_is_obeyed_once(loop: Loop, client: redis.Redis, keys: Keys, recording: Path, tmp_path: Path) -> None:
    after_step(loop, 3, lambda: client.hset(keys.control, "stop", 1))
    assert not loop.run()
    found = find_newest(tmp_path / "checkpoints")
    assert found is not None and found[0].step == 3
    assert not client.hexists(keys.control, "stop") and client.hget(keys.learner, "phase") == b"stopped"
    again = assemble_loop(tmp_path, client, keys, recording)
    assert again.run() and again.progress.step == STEPS
    end(again)


def test_a_stop_stands_until_a_checkpoint_has_been_written(
    loop: Loop, client: redis.Redis, keys: Keys, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner that is killed before leaves the order to the next one."""

    def die() -> None:
        raise KeyboardInterrupt

    client.hset(keys.control, "stop", 1)
    loop.intake.poll_control_state()
    monkeypatch.setattr(loop.checkpointer, "write_last", die)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    again = assemble_loop(tmp_path, client, keys, recording)
    assert not again.run() and again.progress.step == 0
    assert not client.hexists(keys.control, "stop")
    end(again)


def test_a_checkpoint_is_written_when_one_more_is_asked_for(
    loop: Loop, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    loop.live_config.config = loop.config.model_copy(
        update={"learner": loop.config.learner.model_copy(update={"checkpoint_interval_steps": 100})}
    )
    after_step(loop, 3, lambda: client.hincrby(keys.control, "checkpoints", 1))
    assert loop.run()
    assert [read_record(folder).step for folder in checkpoint_folders(tmp_path / "checkpoints")] == [3, STEPS]


def test_what_comes_over_http_counts_at_once_and_is_written_to_redis(
    loop: Loop, client: redis.Redis, keys: Keys
) -> None:
    loop.switches.pause()
    assert loop.switches.paused.is_set() and not client.exists(keys.control)
    loop.switches.sync_from(parse_desired_state({}))
    assert loop.switches.paused.is_set(), "what was read before it was written is older"
    loop.intake.poll_once()
    assert parse_desired_state(client.hgetall(keys.control)).is_paused and loop.switches.unpersisted == []
    loop.switches.resume()
    loop.switches.request_checkpoint()
    loop.intake.control_state.sync_desired_state()
    assert client.hgetall(keys.control) == {b"checkpoints": b"1"} and not loop.switches.paused.is_set()
    assert loop.intake.control_state.desired_state.checkpoints == 1


def test_an_order_over_http_answers_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches_module, "PERSIST_TIMEOUT_S", 0.01)
    switches = Switches()
    switches.request_stop()
    switches.wait_until_persisted()
    assert switches.stop.is_set() and switches.unpersisted == [("HSET", "stop", 1)]


def test_settings_count_from_the_next_step_on(loop: Loop, client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    lr, eps_clip = loop.config.optimizer.lr, loop.config.actor.eps_clip
    after_step(loop, 2, lambda: order_settings(client, keys, 1, optimizer__lr=lr * 10, actor__eps_clip=0.05))
    after_step(loop, 4, lambda: order_settings(client, keys, 2, optimizer__lr=-1.0))
    seen: list[float] = []
    train = loop.trainer.train

    def watch(*arguments: Any) -> dict[str, float]:
        seen.append(loop.trainer.config.actor.eps_clip)
        return train(*arguments)

    loop.trainer.train = watch  # type: ignore[assignment, method-assign]
    assert loop.run()
    rates = [row["lr"] for row in rows_of(tmp_path, "step")]
    linear = [1 - step / STEPS * 0.8 for step in range(STEPS)]
    assert rates == pytest.approx([lr * x * (1 if step < 2 else 10) for step, x in enumerate(linear)])
    assert seen == [eps_clip] * 2 + [0.05] * 4
    assert client.hget(keys.learner, "settings_version") == b"1"
    values: dict[str, int | float | None] = {"optimizer.lr": lr * 10, "actor.eps_clip": 0.05}
    assert events_of(client, keys, "settings_applied") == [{"version": 1, "step": 2, "values": values}]
    (refused,) = events_of(client, keys, "settings_refused")
    assert refused["version"] == 2 and "optimizer.lr is -1.0: input should be greater than 0" in refused["reason"]
    found = find_newest(tmp_path / "checkpoints")
    assert found is not None and found[0].settings == Settings(1, values)


def test_settings_are_taken_up_from_the_checkpoint_when_redis_has_none(
    loop: Loop, client: redis.Redis, keys: Keys, recording: Path, tmp_path: Path
) -> None:
    after_step(loop, 2, lambda: order_settings(client, keys, 7, sampling__temperature=0.5, learner__max_staleness=1))
    after_step(loop, 3, loop.switches.stop.set)
    assert not loop.run()
    client.hdel(keys.control, "settings")
    again = assemble_loop(tmp_path, client, keys, recording)
    assert again.live_config.settings.version == 7 and again.intake.config == again.trainer.config == again.config
    assert (again.config.sampling.temperature, again.intake.config.learner.max_staleness) == (0.5, 1)
    assert again.live_config.configured == make_config()
    assert parse_desired_state(client.hgetall(keys.control)).settings == again.live_config.settings
    end(again)


def test_which_settings_count_at_a_start() -> None:
    config = make_config()

    def take(in_redis: Settings, in_checkpoint: Settings) -> tuple[float | None, int, int]:
        found, newest = live_config.resume_config(config, in_redis, in_checkpoint, GuardState())
        return hot_reloadable_values(found.config)["optimizer.lr"], found.settings.version, newest.version

    def lr(version: int, value: float) -> Settings:
        return Settings(version, {"optimizer.lr": value})

    assert take(Settings(), Settings()) == (config.optimizer.lr, 0, 0)
    assert take(lr(3, 0.5), lr(3, 0.25)) == (0.5, 3, 3)
    assert take(lr(2, 0.5), lr(3, 0.25)) == (0.25, 3, 3)
    assert take(lr(4, -1.0), lr(3, 0.25)) == (0.25, 3, 4), "what had been refused stands and does not count"
    assert take(lr(4, -1.0), lr(3, -1.0)) == (config.optimizer.lr, 0, 4)


def test_a_record_of_before_settings_still_loads() -> None:
    fields = {"epoch": 1, "step": 2, "version": 3, "cursor": [0, 1], "version_steps": {}, "settlements": []}
    fields |= {"earlier": [], "unfinished": [], "counts": {}, "wall_s": 1.0}
    assert msgspec.json.decode(json.dumps(fields), type=CheckpointRecord).settings == Settings()
