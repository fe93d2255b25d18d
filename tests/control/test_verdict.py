"""The checks, and the verdict: the worst check, since when, and what to do."""

from dataclasses import replace
from typing import Any

import pytest

from headrace.control.http.redaction import redact_secrets
from headrace.control.models.status import Verdict
from headrace.control.verdict.check_inputs import CheckInputs, ReplicaInput
from headrace.control.verdict.input_collector import ConditionTimer, ReplicaTracker
from headrace.control.verdict.verdict import VerdictTracker, all_checks
from tests.support.factories import make_ticket
from tests.support.seeded_run import heartbeat

SERVES = ReplicaInput("a", "running", "", 0)
STARTS = ReplicaInput("a", "starting", "the engine is starting for 6 s", 0)
ILL = ReplicaInput("b", "quarantined", "checksums differ for 7 s", 0)
UNSCORED = ReplicaInput("a", "running", "rewards fail: ticket 0-1: ValueError: no for 9 s", 0, {"rewards_failing": 9.0})
WELL = CheckInputs(phase="training", step=9, steps=60, replicas=(SERVES,), is_exact=True)


def verdict_of(**changes: Any) -> Verdict:
    return VerdictTracker().verdict(all_checks(replace(WELL, **changes)), 1.0)


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({}, "healthy", "healthy"),
        ({"phase": ""}, "waiting", "the learner is loading, or has not been started"),
        ({"phase": "finished", "replicas": ()}, "ended", "the run is complete: 9 steps"),
        ({"phase": "stopped", "learner_silent_s": 99.0}, "ended", "the run was stopped after step 9 of 60"),
        ({"phase": "failed", "reason": "no space for 9 s"}, "critical", "the learner failed: no space"),
        ({"phase": "starved", "reason": "x"}, "critical", "the learner gave up waiting: x"),
        ({"learner_silent_s": 4.9}, "healthy", "healthy"),
        ({"learner_silent_s": 6.0}, "warning", "the learner has not answered lately"),
        ({"learner_silent_s": 16.0}, "critical", "the learner does not answer"),
        ({"redis_unavailable_s": 0.001}, "critical", "Redis does not answer; the data shown is from before"),
        ({"is_paused": True}, "waiting", "paused on request"),
        ({"is_stopping": True, "is_paused": True}, "waiting", "stopping on request: after the step in progress"),
        ({"replicas": (), "no_replica_s": 59.0}, "waiting", "no live replica"),
        ({"replicas": (), "no_replica_s": 61.0}, "critical", "the learner starves: no live replica"),
        ({"replicas": (), "no_replica_s": 61.0, "desired_replicas": 0}, "waiting", "scaled to 0 replicas on request"),
        ({"replicas": (ILL,), "no_replica_s": 61.0}, "critical", "no replica serves"),
        ({"replicas": (ILL, SERVES)}, "warning", "1 of 2 replicas quarantined: b: checksums differ"),
        (
            {"replicas": (SERVES._replace(state="starting", reason="the engine is starting for 6 s"),)},
            "waiting",
            "no rep",
        ),
        ({"replicas": (SERVES._replace(versions_behind=3),)}, "healthy", "healthy"),
        ({"replicas": (SERVES._replace(versions_behind=4),)}, "warning", "a is 4 weight versions behind"),
        ({"waiting_s": 30.0}, "healthy", "healthy"),
        ({"waiting_s": 31.0}, "warning", "the learner starves: replicas serve, but no batch arrives"),
        ({"waiting_s": 901.0}, "critical", "the learner starves: replicas serve, but no batch arrives"),
        ({"waiting_s": 901.0, "is_paused": True}, "waiting", "paused on request"),
        ({"num_recent_dead": 1}, "warning", "1 new dead letter in the last 10 minutes"),
        (
            {"num_recent_dead": 2, "dead_reason": "ValueError"},
            "warning",
            "2 new dead letters in the last 10 minutes, the",
        ),
        ({"replicas": (UNSCORED,)}, "warning", "a: rewards fail: ticket 0-1: ValueError: no"),
        ({"replicas": (UNSCORED,), "waiting_s": 31.0}, "critical", "a: rewards fail: ticket 0-1: ValueError: no"),
        ({"replicas": (UNSCORED,), "phase": "finished"}, "ended", "the run is complete"),
        ({"num_recent_dead": 20}, "critical", "20 new dead letters in the last 10 minutes"),
        ({"checkpoint_failing_s": 1.0}, "critical", "the checkpoint cannot be written"),
        ({"settings_unapplied_s": 61.0}, "waiting", "changed settings wait for the learner's next step"),
        (
            {"held_back": "lr 1e-05 instead of 2e-05"},
            "warning",
            "the guard has tightened the run: lr 1e-05",
        ),
        ({"recent": {"kl_behaviour_proximal": [0.06] * 3 + [0.0] * 2}}, "warning", "the policy is far from the one"),
        ({"recent": {"kl_behaviour_proximal": [9.0] * 2 + [0.0] * 3}}, "healthy", "healthy"),
        ({"recent": {"kl_behaviour_proximal": [0.3]}}, "critical", "the policy is far from the one that sampled"),
        ({"recent": {"ess": [0.4] * 5}}, "warning", "few tokens carry the batch"),
        ({"recent": {"ess": [0.1] * 5}}, "critical", "few tokens carry the batch"),
        ({"recent": {"clip_fraction": [0.6] * 5}}, "warning", "most tokens are clipped"),
        ({"recent": {"dropped_length_bias": [0.04] * 5}}, "healthy", "healthy"),
        ({"recent": {"dropped_length_bias": [-0.3] * 5}}, "healthy", "healthy"),
        ({"recent": {"dropped_length_bias": [0.1] * 5}}, "warning", "dropped are the long ones"),
        ({"recent": {"episodes_failed_share": [0.05] * 5, "rewritten_share": [0.1] * 5}}, "healthy", "healthy"),
        ({"recent": {"episodes_failed_share": [0.06] * 5}}, "warning", "episodes fail (episodes_failed_share 0.06)"),
        ({"recent": {"episodes_failed_share": [0.3] * 5}}, "critical", "episodes fail"),
        ({"recent": {"rewritten_share": [1.0] * 5}}, "warning", "the agent rewrites its history"),
        ({"recent": {"dropped_length_bias": [0.3] * 5}}, "critical", "dropped are the long ones"),
        ({"recent": {"fresh_logprob_gap_rms": [5e-3] * 5}}, "warning", "engine and learner disagree"),
        ({"recent": {"fresh_logprob_gap_rms": [0.04] * 5}, "is_exact": False}, "healthy", "healthy"),
        ({"recent": {"fresh_logprob_gap_rms": [0.2] * 5}, "is_exact": False}, "warning", "engine and learner disagree"),
        ({"recent": {"skipped_updates": [0.0, 1.0, 0.0]}}, "warning", "1 of the last 3 steps skipped updates"),
        ({"recent": {"skipped_updates": [2.0] * 5}}, "critical", "5 of the last 5 steps skipped updates"),
    ],
)
def test_the_verdict_is_the_worst_check(changes: dict[str, Any], level: str, text: str) -> None:
    verdict = verdict_of(**changes)
    assert (verdict.level, verdict.text[: len(text)]) == (level, text)


def test_the_advice_names_dead_letters_when_they_are_the_cause() -> None:
    for changes in ({"replicas": (UNSCORED,)}, {"num_recent_dead": 1}):
        assert verdict_of(waiting_s=31.0, **changes).advice.startswith("`headrace dead-letters list` shows")
    assert "headrace dead-letters list" not in verdict_of(waiting_s=31.0).advice


def test_the_worst_check_comes_first_and_others_are_counted() -> None:
    verdict = verdict_of(redis_unavailable_s=1.0, checkpoint_failing_s=1.0, num_recent_dead=1, is_paused=True)
    assert verdict.text == "Redis does not answer; the data shown is from before (and 1 more)"
    levels = [
        check_result.check.level
        for check_result in all_checks(replace(WELL, redis_unavailable_s=1.0, num_recent_dead=1))
    ]
    assert levels[:3] == ["critical", "warning", "healthy"] and len({f.check.name for f in all_checks(WELL)}) == len(
        levels
    )


def test_the_start_of_a_verdict_is_kept_while_it_lasts() -> None:
    tracker = VerdictTracker()
    told = [
        tracker.verdict(all_checks(inputs), now).since_at
        for now, inputs in enumerate(
            [
                WELL,
                WELL,
                replace(WELL, learner_silent_s=6.0),
                replace(WELL, learner_silent_s=7.0),
                replace(WELL, learner_silent_s=16.0),
                replace(WELL, learner_silent_s=17.0, num_recent_dead=1),
                WELL,
            ]
        )
    ]
    assert told == [0, 0, 2, 2, 4, 4, 6]


def test_the_timer_of_a_condition() -> None:
    timer = ConditionTimer()
    assert timer.duration_s("x", False, 1.0) == 0
    assert timer.duration_s("x", True, 2.0) > 0
    assert timer.duration_s("x", True, 5.0) == 3
    assert timer.duration_s("x", False, 6.0) == 0 and 0 < timer.duration_s("x", True, 7.0) < 1


def test_rates_cover_half_a_minute_of_one_process() -> None:
    tracker = ReplicaTracker()
    first = heartbeat("a", "http://a", 1)
    fields = {name: getattr(first, name) for name in first.__struct_fields__}

    def beat(now: float, tokens: int, waiting_s: float, serving_s: float) -> None:
        changed = fields | {"tokens_generated": tokens, "waiting_s": waiting_s, "serving_s": serving_s}
        tracker.add([type(first)(**changed)], now)

    beat(0, 1000, 0, 10)
    assert tracker.rates("a") == (None, None) == tracker.rates("nobody")
    beat(10, 2000, 5, 20)
    assert tracker.rates("a") == (100.0, 0.5)
    beat(60, 2100, 5, 70)
    beat(61, 2200, 5, 71)
    assert tracker.rates("a").tokens_per_s == pytest.approx(200 / 51)
    beat(100, 10, 0, 1)
    assert tracker.rates("a") == (None, None) and tracker.seen_since_at == {"a": 0}
    tracker.add([], 101)
    assert tracker.seen_since_at == {}


def test_secrets_are_redacted() -> None:
    shown = redact_secrets(
        {
            "api_key": "s",
            "micro_batch_tokens": 7,
            "token": "s",
            "max_tokens": "2",
            "list": ["--hf-token", "s", "--password=s", "--port", "1", "redis://:s@host:1/0"],
            "deep": {"db": {"password": "s", "user": "u"}, "url": "https://u:s@host/path"},
            "ticket": make_ticket().id,
        }
    )
    assert shown["micro_batch_tokens"] == 7 and shown["deep"]["db"] == {"password": "***", "user": "u"}
    assert shown["api_key"] == shown["token"] == "***" and shown["ticket"] == "0-0"
    assert shown["list"] == ["--hf-token", "***", "--password=***", "--port", "1", "redis://***@host:1/0"]
    assert shown["deep"]["url"] == "https://***@host/path"
