"""The advice on the number of replicas, against hand-worked examples."""

from typing import Any

import pytest

from headrace.common.wire import Heartbeat
from headrace.learner.scaling import advice
from headrace.learner.scaling.advice import MIN_STEPS, WINDOW_S, ReplicaAdviser

STEP_S = 10.0
NUM_SLOTS = 4
FULL = int(WINDOW_S / STEP_S)


class Measured:
    """An adviser, and replicas that send the given heartbeats: cumulative seconds, as real ones do."""

    def __init__(self, count: int = 1, start: int = 1, max_replicas: int = 8) -> None:
        self.adviser = ReplicaAdviser(start, max_replicas, NUM_SLOTS)
        self.beats: dict[str, Heartbeat] = {}
        self.run_with(count)

    def run_with(self, count: int) -> None:
        fresh = Heartbeat("", "http://127.0.0.1:1", "running", "", 1, 0, 0, 0, 0.0, 0.0)
        names = [f"r{index}" for index in range(count)]
        self.beats = {name: self.beats.get(name) or _with(fresh, replica=name) for name in names}
        self.adviser.observe(0.0, 0.0, self.beats.values(), 0.0)

    def step(
        self,
        waiting: float,
        idle: float,
        groups_per_s: float = 1.0,
        steps_in_queue: float = 0.0,
        filled: int = NUM_SLOTS,
    ) -> int:
        """One step of `STEP_S` with these shares; returns the number that is then advised."""
        for part, waited_s, worked_s in ((waiting, STEP_S * waiting, 0.0), (1 - waiting, 0.0, STEP_S * (1 - waiting))):
            for name, beat in self.beats.items():
                self.beats[name] = _with(
                    beat,
                    serving_s=beat.serving_s + STEP_S * part,
                    waiting_s=beat.waiting_s + STEP_S * part * idle,
                    groups_in_flight=filled,
                    groups_committed=beat.groups_committed + round(1000 * groups_per_s * part / len(self.beats)),
                )
            self.adviser.observe(waited_s, worked_s, self.beats.values(), steps_in_queue)
        return self.adviser.advice.replicas

    def window(self, waiting: float, idle: float, **others: Any) -> int:
        return [self.step(waiting, idle, **others) for _ in range(FULL + 1)][-1]


def _with(beat: Heartbeat, **changes: Any) -> Heartbeat:
    fields = {name: getattr(beat, name) for name in beat.__struct_fields__}
    return Heartbeat(**(fields | changes))


@pytest.mark.parametrize(
    ("count", "waiting", "idle", "advised"),
    [
        (1, 0.0, 0.0, 1),
        (1, 0.45, 0.0, 2),  # 1 / 0.55 = 1.8
        (2, 0.5, 0.0, 4),
        (4, 0.3, 0.0, 6),  # 5.7, of which 95 % are 5.4
        (1, 0.9, 0.0, 2),  # ten would be needed: never more than twice as many
        (6, 0.5, 0.0, 8),  # max_replicas
        (4, 0.15, 0.0, 4),  # the learner hardly waits
        (4, 0.0, 0.5, 2),
        (4, 0.0, 0.2, 4),  # 3.2 are needed: three would leave it waiting
        (3, 0.0, 0.95, 1),
        (2, 0.5, 0.5, 2),  # both wait for each other: another replica does not help
        (1, 0.0, 1.0, 1),
    ],
)
def test_the_number_follows_from_both_shares(count: int, waiting: float, idle: float, advised: int) -> None:
    assert Measured(count, start=count).window(waiting, idle) == advised


def test_the_reason_says_what_was_measured() -> None:
    measured = Measured()
    assert measured.adviser.advice.reason == "nothing has been measured yet"
    measured.window(0.45, 0.02)
    expected = "the learner waits 45% of its time for groups, replicas 2% of theirs for tickets"
    assert measured.adviser.advice.reason == expected
    assert measured.window(0.45, 0.02, steps_in_queue=1.5) == 1
    assert measured.adviser.advice.reason == f"{expected}: groups have waited 1.5 steps for it"


def test_nothing_changes_before_a_window_is_full() -> None:
    measured = Measured()
    assert [measured.step(0.5, 0.0) for _ in range(FULL)] == [1] * (FULL - 1) + [2]


def test_an_advice_that_is_not_yet_followed_is_kept() -> None:
    assert Measured(1, start=3).window(0.5, 0.0) == 3


def test_few_long_steps_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "WINDOW_S", 1.0)
    measured = Measured()
    assert [measured.step(0.5, 0.0) for _ in range(MIN_STEPS)] == [1] * (MIN_STEPS - 1) + [2]


def test_a_change_of_replicas_restarts_the_measurement() -> None:
    measured = Measured()
    assert measured.window(0.5, 0.0) == 2
    measured.run_with(2)
    assert [measured.step(0.5, 0.0, groups_per_s=2.0) for _ in range(FULL - 1)] == [2] * (FULL - 1)
    assert measured.window(0.5, 0.0, groups_per_s=2.0) == 4


def test_what_was_long_ago_is_forgotten() -> None:
    measured = Measured(2, start=2)
    assert measured.window(0.5, 0.0) == 4
    assert measured.window(0.0, 0.0) == 2


def test_a_crash_does_not_change_the_advice() -> None:
    measured = Measured()
    assert measured.window(0.5, 0.0) == 2
    measured.run_with(0)
    assert measured.adviser.advice.replicas == 2
    measured.run_with(1)
    assert measured.step(0.0, 0.9) == 2, "too early to say"


def test_a_replica_that_restarted_between_heartbeats_counts_from_its_restart() -> None:
    measured = Measured(start=1)
    for _ in range(FULL):
        measured.step(0.0, 0.9)
    measured.beats["r0"] = _with(measured.beats["r0"], serving_s=0.0, waiting_s=0.0, groups_committed=0)
    assert measured.window(0.5, 0.0) == 2


def test_no_more_replicas_are_advised_after_some_without_a_gain() -> None:
    """Such as several replicas on one machine's cores; the next change of the number is judged separately."""
    measured = Measured()
    assert measured.window(0.5, 0.0, groups_per_s=1.0) == 2
    measured.run_with(2)
    assert measured.window(0.5, 0.0, groups_per_s=1.1) == 2
    assert measured.adviser.advice.reason.endswith("the latest replicas have brought hardly any more groups")
    assert measured.window(0.5, 0.0, groups_per_s=1.1) == 2
    measured.run_with(3)
    assert measured.window(0.5, 0.0, groups_per_s=1.6) == 6


def test_the_advice_does_not_flap_around_a_threshold() -> None:
    """Whether the advice is followed or not."""
    measured = Measured()
    assert [measured.window(waiting, 0.0) for waiting in (0.15, 0.21, 0.19, 0.11, 0.2)] == [1, 2, 2, 2, 2]
    assert measured.window(0.05, 0.0) == 1, "it has passed without another replica"
    measured = Measured(4, start=4)
    assert [measured.window(0.0, idle) for idle in (0.2, 0.22, 0.2, 0.25)] == [4, 3, 3, 3]
    assert measured.window(0.15, 0.0) == 4


def test_a_number_that_was_too_few_is_not_advised_again_for_an_hour() -> None:
    measured = Measured()
    assert measured.window(0.5, 0.0) == 2
    measured.run_with(2)
    num_windows = int(advice.TOO_FEW_MEMORY_S / (STEP_S * (FULL + 1)))
    assert {measured.window(0.0, 0.9, groups_per_s=2.0) for _ in range(num_windows - 2)} == {2}
    assert [measured.window(0.0, 0.9, groups_per_s=2.0) for _ in range(3)][-1] == 1


def test_one_replica_fewer_is_advised_if_the_groups_in_flight_fit() -> None:
    """With few groups each replica is idle part of the time."""
    for filled, advised in ((4, 4), (3, 4), (2, 3), (1, 3)):
        assert Measured(4, start=4).window(0.0, 0.0, filled=filled) == advised


def test_the_bounds_hold_for_any_configured_start() -> None:
    assert ReplicaAdviser(0, 8, 4).advice.replicas == 1
    assert ReplicaAdviser(9, 8, 4).advice.replicas == 8
    assert Measured(9, start=9).window(0.0, 0.0) == 8
