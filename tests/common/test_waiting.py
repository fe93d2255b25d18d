"""Waits: their reason and length are there to be seen, and the log tells of the long ones, more and more rarely."""

import logging

import pytest

from headrace.common.process.waiting import Reason, Waits, parse_waits


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
    assert waits.waiting(Reason.STARVED, "no group", deadline_s=30.0) == 0.0
    clock.now += 12.3
    assert waits.waiting(Reason.STARVED, "3 of 16 groups", deadline_s=30.0) == pytest.approx(12.3)
    assert waits.status() == [{"reason": "starved", "detail": "3 of 16 groups", "for_s": 12.3, "deadline_s": 30.0}]
    assert waits.describe() == "starved: 3 of 16 groups for 12 s"
    waits.over(Reason.STARVED)
    assert waits.status() == [] and waits.describe() == "" and not waits.is_waiting(Reason.STARVED)
    waits.over(Reason.STARVED)  # twice does no harm


def test_the_longest_comes_first(clock: Clock) -> None:
    waits = Waits(clock)
    waits.waiting(Reason.WEIGHTS)
    clock.now += 1
    waits.waiting(Reason.REDIS_UNREACHABLE, "connection refused")
    assert [wait["reason"] for wait in waits.status()] == ["weights", "Redis unreachable"]


def test_only_long_waits_are_logged_and_ever_more_rarely(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits(clock)
    with caplog.at_level(logging.WARNING):
        waits.waiting(Reason.PAUSED)
        waits.over(Reason.PAUSED)
        for _ in range(60):
            clock.now += 1
            waits.waiting(Reason.STARVED, "no live replica", 90.0)
        waits.over(Reason.STARVED)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "waiting for 5 s, until 90 s: starved: no live replica",
        "waiting for 10 s, until 90 s: starved: no live replica",
        "waiting for 20 s, until 90 s: starved: no live replica",
        "waiting for 40 s, until 90 s: starved: no live replica",
        "over after 59 s: starved: no live replica",
    ]


def test_what_is_described_can_be_parsed(clock: Clock) -> None:
    waits = Waits(clock)
    waits.waiting(Reason.CHECKPOINT, "disk: full for 3 s; really")
    clock.now += 20
    waits.waiting(Reason.STARVED, "0 of 16 groups; replicas: a starting (the engine is starting for 6 s); so far {}")
    waits.waiting(Reason.PAUSED)
    clock.now += 5
    expected = {"the checkpoint cannot be written": 25.0, "starved": 5.0, "paused": 5.0}
    assert parse_waits(waits.describe()) == expected
    assert parse_waits("") == parse_waits("the engine is odd for 4 s") == parse_waits("starved") == {}
