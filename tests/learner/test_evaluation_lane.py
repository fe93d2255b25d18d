"""Evaluations beside training in a real learner, whose tickets a pretended replica answers at once."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.common.process.waiting import Reason
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, Heartbeat, Ticket, Timings, encode
from headrace.learner.checkpoints.best import read_best_record
from headrace.learner.loop import Loop
from tests.support.commits import answer_all
from tests.support.factories import make_rollout
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.replay import assemble_loop, end

SETTINGS = ["learner.groups_per_step=2", "evaluation.num_prompts=3", "evaluation.completions_per_prompt=2"]
HEARTBEAT = Heartbeat("r", "http://127.0.0.1:1", "running", "", 0, 0, 0, 0, 0.0, 1.0)


class Replica:
    """Answers training tickets, and evaluation tickets while `is_evaluating`: with 0 and `reward`, which may change."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.is_evaluating = threading.Event()
        self.is_evaluating.set()
        self.reward = 1.0
        self._client, self._keys, self._ending = connect(url), keys, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._client.set(keys.replica("r"), encode(HEARTBEAT))
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()
        self._client.close()

    def _work(self) -> None:
        while not self._ending.wait(0.01):
            answer_all(self._client, self._keys, self._keys.tickets, self._group)
            if self.is_evaluating.is_set():
                answer_all(self._client, self._keys, self._keys.eval_tickets, self._group)

    def _group(self, ticket: Ticket) -> Group:
        best = 1.0 if ticket.kind == "train" else self.reward
        rewards = [best if index == 0 else 0.0 for index in range(ticket.num_completions)]
        version = ticket.min_weight_version
        rollouts = [make_rollout(reward, (8 + index, 9, 1), version) for index, reward in enumerate(rewards)]
        return Group(ticket, rollouts, "r", Timings(1.0, 2.0, 3.0))


@pytest.fixture
def replica(redis_url: str, client: redis.Redis, keys: Keys) -> Iterator[Replica]:
    for stream in (keys.tickets, keys.eval_tickets):
        client.xgroup_create(stream, "generation", id="0", mkstream=True)
    found = Replica(redis_url, keys)
    yield found
    found.end()


@contextmanager
def running(loop: Loop) -> Iterator[None]:
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield
    thread.join(GUARD_S)
    assert not thread.is_alive()
    end(loop)


def test_an_evaluation_that_is_asked_for_runs_beside_training(
    replica: Replica, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    settings = ["learner.steps=10000", "evaluation.interval_steps=0"]
    loop = assemble_loop(tmp_path, client, keys, None, *SETTINGS, *settings)
    with running(loop):
        until(lambda: loop.progress.step >= 2, "two steps")
        replica.is_evaluating.clear()
        client.hincrby(keys.control, "evaluations", 1)
        until(lambda: loop.intake.evaluation.is_running, "the evaluation that was asked for")
        asked = loop.progress.step
        until(lambda: loop.progress.step >= asked + 2, "two more steps while it runs")
        client.hincrby(keys.control, "evaluations", 1)
        replica.is_evaluating.set()
        until(lambda: len(rows_of(tmp_path, "evaluation")) == 3, "its result, and of the second")
        client.hset(keys.control, "stop", 1)
    first, second, third = rows_of(tmp_path, "evaluation")
    assert first["step"] == 0 and 2 <= second["step"] < third["step"]
    assert [row["weight_version"] for row in (first, second, third)] == [
        row["step"] + 1 for row in (first, second, third)
    ]
    assert second["pass_at_1"] == second["held_out"] == 0.5 and second["pass_at_2"] == 1.0
    history = [fields for _, fields in client.xrange(keys.history) if fields[b"kind"] == b"evaluation"]
    assert [json.loads(fields[b"row"])["weight_version"] for fields in history] == [
        first["weight_version"],
        *(row["weight_version"] for row in (second, third)),
    ]
    shown = [fields for _, fields in client.xrange(keys.samples) if fields[b"kind"] == b"eval"]
    assert len(shown) == 9 and {fields[b"state"] for fields in shown} == {b"evaluated"}


def test_the_best_step_is_named_though_training_has_gone_on(
    replica: Replica, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    settings = ["learner.steps=6", "evaluation.interval_steps=2", "learner.checkpoint_interval_steps=100"]
    loop = assemble_loop(tmp_path, client, keys, None, *SETTINGS, *settings)
    begin = loop.intake.evaluation.begin

    def begin_evaluation(step: int, version: int) -> None:
        replica.reward = {0: 0.5, 2: 1.0}.get(step, 0.25)
        begin(step, version)

    loop.intake.evaluation.begin = begin_evaluation  # type: ignore[method-assign]
    with running(loop):
        until(lambda: (tmp_path / "metrics.jsonl").read_text().count('"evaluation"') >= 3, "the last evaluation")
    rows = {row["step"]: row["is_best"] for row in rows_of(tmp_path, "evaluation")}
    assert rows[0] and rows[2] and not rows[6], rows
    named = read_best_record(tmp_path)
    assert named is not None and (named.step, named.version, named.held_out) == (2, 3, 0.5)


def test_the_first_step_is_taken_beside_the_first_evaluation_whose_tokens_are_of_one_version(
    replica: Replica, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    replica.is_evaluating.clear()
    announced: list[str] = []
    loop = assemble_loop(tmp_path, client, keys, None, *SETTINGS, "learner.steps=3")
    execute = loop.store.execute

    def note_and_execute(commands: Any) -> None:
        commands = list(commands)
        announced.extend(str(command[3]) for command in commands if command[1] == keys.weights)
        execute(commands)

    loop.store.execute = note_and_execute  # type: ignore[method-assign]
    with running(loop):
        until(lambda: loop.progress.step == 1, "the first step, beside the evaluation")
        until(lambda: loop.waits.is_waiting(Reason.WAITING_FOR_EVALUATION), "the second step waits", loop.waits.status)
        assert loop.intake.evaluation.is_first_open and not rows_of(tmp_path, "evaluation")
        assert (loop.versions.current, announced) == (1, ["1"])
        assert client.hget(keys.weights, "version") == b"1" and loop.progress.step == 1
        replica.is_evaluating.set()
    first, last = rows_of(tmp_path, "evaluation")
    assert (first["step"], first["weight_version"], first["first_token_step_mean"]) == (0, 1, 0.0)
    assert (last["step"], last["weight_version"]) == (3, 4) and announced == ["1", "2", "3", "4"]


def test_a_version_is_not_evaluated_twice(replica: Replica, client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    """Its tickets exist already: a second evaluation would wait for ever."""
    loop = assemble_loop(tmp_path, client, keys, None, *SETTINGS, "learner.steps=3")
    loop.publish_first()
    loop.evaluator.begin()
    assert loop.evaluator.best.keep_if_best(0.5)
    loop.intake.evaluation._evaluation = None
    loop.evaluator.is_due = True
    loop._evaluate_if_due()
    assert not loop.intake.evaluation.is_running
    loop._publish()
    loop.publisher.wait()
    assert loop.intake.evaluation.is_running and not loop.evaluator.is_due
    end(loop)
