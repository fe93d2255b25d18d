"""What the launcher shows of a run, whatever stands in Redis, and while nobody answers."""

import io
import re
import time
from typing import Any

import msgspec
import pytest
import redis
from rich.console import Console

from headrace.common.http.addresses import free_port, listen
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, encode
from headrace.launcher.run.redis_server import redis_url_at
from headrace.launcher.terminal import progress_view
from headrace.launcher.terminal.progress_view import ProgressView
from headrace.launcher.terminal.step_table import StepEvent

STEP = StepEvent(
    step=1,
    run_generated_tokens=100,
    sampled_reward_mean=0.5,
    staleness_mean=1.0,
    run_uniform_share=0.25,
    wall_s=2.0,
    wait_s=0.1,
    step_s=0.2,
    kl_behaviour_proximal=0.001,
)


def beat(client: redis.Redis, keys: Keys, name: str, **fields: Any) -> None:
    heartbeat = Heartbeat(name, "http://127.0.0.1:1", "running", "", 1, 0, 0, 0, 0.0, 0.0)
    client.set(keys.replica(name), encode(msgspec.structs.replace(heartbeat, **fields)))


def announce(client: redis.Redis, keys: Keys, kind: str, payload: bytes) -> None:
    client.xadd(keys.events, {"kind": kind, "event": payload})


class Seen(ProgressView):
    """Its lines, without their times."""

    def __init__(self, url: str, keys: Keys, is_terminal: bool = False) -> None:
        self.output = io.StringIO()
        super().__init__(url, keys, 9, Console(file=self.output, force_terminal=is_terminal, width=200))

    def new_lines(self) -> list[str]:
        lines = [line.partition("] ")[2] for line in self.output.getvalue().splitlines()]
        self.output.seek(0)
        self.output.truncate()
        return lines


def test_what_cannot_be_decoded_is_passed_over(client: redis.Redis, redis_url: str, keys: Keys) -> None:
    beat(client, keys, "a")
    client.set(keys.replica("b"), b"\xff no heartbeat")
    client.hset(keys.learner, mapping={"phase": b"\xfftraining", "step": "many"})
    for kind, payload in (
        ("step", b"\xff"),
        ("step", b"[1]"),
        ("step", b'{"step": 1}'),
        ("evaluation", b'{"step": 1, "held_out": "high", "num_completions": 2}'),
        ("of another version", b"{}"),
        ("step", msgspec.json.encode(msgspec.structs.replace(STEP, kl_behaviour_proximal=float("nan")))),
        ("evaluation", b'{"step": 1, "held_out": 0.5, "num_completions": 2}'),
    ):
        announce(client, keys, kind, payload)
    client.xadd(keys.events, {"neither": "this"})
    with Seen(redis_url, keys) as view:
        view.refresh()
        assert view.new_lines() == [
            "learner: \N{REPLACEMENT CHARACTER}training; replicas: 1 running",
            "step 1, reward 0.500, staleness 1.00, uniform 25%, tokens/s 50, waited 0.10 s, step time 0.20 s, KL – "
            "(of 9 steps)",
            "held-out pass@1 0.500 after step 1, 2 completions",
        ]
        view.refresh()
        assert view.new_lines() == []


def test_a_reason_to_wait_is_told_when_it_lasts(
    client: redis.Redis, redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(progress_view, "monotonic", lambda: now)
    told = "the learner waits: not enough groups: 3 of 16 groups for"
    with Seen(redis_url, keys) as view:
        for seconds in range(4):
            now += 1
            client.hset(
                keys.learner,
                mapping={"phase": "waiting", "reason": f"not enough groups: 3 of 16 groups for {seconds} s"},
            )
            view.refresh()
        assert view.new_lines() == ["learner: waiting; replicas: none yet"]
        now += 5
        view.refresh()
        view.refresh()
        assert view.new_lines() == [f"{told} 3 s"]
        client.hset(keys.learner, "reason", "")
        view.refresh()
        client.hset(keys.learner, "reason", "not enough groups: 3 of 16 groups for 0 s")
        view.refresh()
        assert view.new_lines() == []
        now += 6
        view.refresh()
        assert view.new_lines() == [f"{told} 0 s"]


def test_why_rewards_fail_and_what_has_died_is_told(
    client: redis.Redis, redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(progress_view, "monotonic", lambda: now)
    reason = "rewards fail: ticket 0-1: ValueError: no for 2 s"
    told = f"(headrace dead-letters list --run {keys.run}), the latest: ValueError"
    with Seen(redis_url, keys) as view:
        beat(client, keys, "a", reason=reason, waits={"rewards_failing": 2.0})
        view.refresh()
        assert view.new_lines()[1:] == [f"a: {reason}"]
        beat(
            client, keys, "a", reason="rewards fail: ticket 0-2: ValueError: no for 3 s", waits={"rewards_failing": 3.0}
        )
        client.xadd(keys.dead_letters, {"id": "0-1", "reason": "ValueError"})
        view.refresh()
        assert view.new_lines() == [f"1 ticket is dead {told}"]
        client.xadd(keys.dead_letters, {"id": "0-2", "reason": "ValueError"})
        view.refresh()
        assert view.new_lines() == [], "not at each"
        now += 31
        view.refresh()
        view.refresh()
        assert view.new_lines() == [f"2 tickets are dead {told}"]
    with Seen(redis_url, keys, is_terminal=True) as view:
        view.refresh()
    assert f"· 2 tickets are dead {told}" in view.output.getvalue().replace("\n", " ").replace("  ", " ")


def test_the_table_shows_why_the_learner_waits(client: redis.Redis, redis_url: str, keys: Keys) -> None:
    announce(client, keys, "step", msgspec.json.encode(STEP))
    client.hset(keys.learner, mapping={"phase": "waiting", "reason": "no live replica for 3 s"})
    with Seen(redis_url, keys, is_terminal=True) as view:
        view.refresh()
    shown = view.output.getvalue()
    assert "learner: waiting; replicas: none yet · waits: no live replica for 3 s" in shown
    assert re.search(r"│ +1 │ +0.500 │", shown), shown


def test_replicas_are_counted_by_what_they_do(client: redis.Redis, redis_url: str, keys: Keys) -> None:
    beat(client, keys, "a")
    with Seen(redis_url, keys) as view:
        view.refresh()
        beat(client, keys, "b", state="quarantined", reason="no weights for 3 s")
        view.refresh()
        beat(client, keys, "b", state="quarantined", reason="no weights for 4 s")
        view.refresh()
        beat(client, keys, "b")
        view.refresh()
        assert view.new_lines() == [
            "learner: loading the model; replicas: 1 running",
            "learner: loading the model; replicas: 1 quarantined (no weights for 3 s), 1 running",
            "learner: loading the model; replicas: 2 running",
        ]


def test_between_steps_only_what_is_out_of_the_ordinary_is_told(
    client: redis.Redis, redis_url: str, keys: Keys
) -> None:
    beat(client, keys, "a")
    announce(client, keys, "step", msgspec.json.encode(STEP))
    with Seen(redis_url, keys) as view:
        view.refresh()
        view.new_lines()
        for phase in ("training", "waiting", "training"):
            client.hset(keys.learner, "phase", phase)
            view.refresh()
            beat(client, keys, "a", reason="no tickets for 3 s")
            view.refresh()
        assert view.new_lines() == []
        beat(client, keys, "a", state="paused")
        view.refresh()
        client.hset(keys.learner, "phase", "loading")
        view.refresh()
        assert view.new_lines() == ["learner: training; replicas: 1 paused", "learner: loading; replicas: 1 paused"]


def test_no_redis_is_shown_and_freezes_nothing(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone, or frozen: it takes connections and answers nothing."""
    monkeypatch.setattr(progress_view, "REDIS_TIMEOUT_S", 0.2)
    with listen("127.0.0.1", 0) as frozen:
        for port in (free_port(), frozen.getsockname()[1]):
            with Seen(redis_url_at(port), keys) as view:
                view.refresh()
                view.clear_learner_status()
                assert (view.latest_step(), view.latest_reason()) == (0, "")
                assert view.new_lines() == ["Redis unreachable"]


def test_the_highest_step_is_kept(client: redis.Redis, redis_url: str, keys: Keys) -> None:
    with Seen(redis_url, keys) as view:
        for step in (3, 1):
            client.hset(keys.learner, "step", step)
            assert view.latest_step() == 3
