"""Waits: their reason and length are there to be seen, and the log tells of the long ones, more and more rarely."""

import logging
import re

import msgspec
import pytest

from headrace.common.process.waiting import Reason, Waits, decode_waits


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_wait_keeps_its_beginning_and_takes_the_newest_detail(clock: Clock) -> None:
    waits = Waits(clock)
    assert waits.note(Reason.WAITING_FOR_GROUPS, "no group", deadline_s=30.0) == 0.0
    clock.now += 12.3
    assert waits.note(Reason.WAITING_FOR_GROUPS, "3 of 16 groups", deadline_s=30.0) == pytest.approx(12.3)
    assert waits.status() == [
        {
            "reason": "waiting_for_groups",
            "text": "not enough groups",
            "detail": "3 of 16 groups",
            "for_s": 12.3,
            "deadline_s": 30.0,
        }
    ]
    assert waits.describe() == "not enough groups: 3 of 16 groups for 12 s"
    waits.end(Reason.WAITING_FOR_GROUPS)
    assert waits.status() == [] and waits.describe() == "" and not waits.is_waiting(Reason.WAITING_FOR_GROUPS)
    waits.end(Reason.WAITING_FOR_GROUPS)  # twice does no harm


def test_the_longest_comes_first(clock: Clock) -> None:
    waits = Waits(clock)
    waits.note(Reason.WAITING_FOR_WEIGHTS)
    clock.now += 1
    waits.note(Reason.REDIS_UNREACHABLE, "connection refused")
    assert [wait["reason"] for wait in waits.status()] == ["waiting_for_weights", "redis_unreachable"]


def test_only_long_waits_are_logged_and_ever_more_rarely(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits(clock)
    with caplog.at_level(logging.WARNING):
        waits.note(Reason.PAUSED)
        waits.end(Reason.PAUSED)
        for _ in range(60):
            clock.now += 1
            waits.note(Reason.WAITING_FOR_GROUPS, "no live replica", 90.0)
        waits.end(Reason.WAITING_FOR_GROUPS)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "waiting for 5 s, until 90 s: not enough groups: no live replica",
        "waiting for 10 s, until 90 s: not enough groups: no live replica",
        "waiting for 20 s, until 90 s: not enough groups: no live replica",
        "waiting for 40 s, until 90 s: not enough groups: no live replica",
        "over after 59 s: not enough groups: no live replica",
    ]


def test_durations_go_through_redis_by_code(clock: Clock) -> None:
    waits = Waits(clock)
    waits.note(Reason.CHECKPOINT_FAILING, "disk: full for 3 s; really")
    clock.now += 20
    waits.note(Reason.WAITING_FOR_GROUPS, "0 of 16 groups; replicas: a starting (the engine is starting for 6 s)")
    waits.note(Reason.PAUSED)
    clock.now += 5
    expected = {"checkpoint_failing": 25.0, "waiting_for_groups": 5.0, "paused": 5.0}
    assert decode_waits(msgspec.json.encode(waits.durations_s())) == expected == waits.durations_s()
    assert next(iter(waits.durations_s())) == "checkpoint_failing"


@pytest.mark.parametrize("payload", ["", "x", "[]", b"\xff", '{"odd": 4}', '{"paused": "4"}', "[" * 9999])
def test_invalid_durations_are_left_out(payload: str | bytes) -> None:
    assert decode_waits(payload) == {}


def test_codes_are_unique_and_texts_as_well() -> None:
    assert len({reason.text for reason in Reason}) == len({reason.value for reason in Reason}) == len(Reason)
    for reason in Reason:
        assert re.fullmatch("[a-z]+(_[a-z]+)*", reason.value) and reason.name == reason.value.upper()
        assert str(reason) == reason.value == f"{reason}"
