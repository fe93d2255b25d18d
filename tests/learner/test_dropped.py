"""Whether what is dropped is longer or worse than what is trained."""

import pytest

from headrace.common.metrics.thresholds import THRESHOLDS
from headrace.common.wire import Group
from headrace.learner.intake.dropped import MIN_DROPPED, WINDOW_STEPS, DropStatistics
from tests.support.factories import make_group, make_rollout

[BIAS] = [one for one in THRESHOLDS if one.name == "dropped_length_bias"]


def of_length(num_tokens: int, reward: float = 0.5) -> Group:
    group = make_group(rewards=(reward, reward))
    return Group(group.ticket, [make_rollout(reward, (8,) * num_tokens)] * 2, "r", group.timings)


def test_dropped_groups_are_told_beside_the_trained_ones() -> None:
    statistics = DropStatistics()
    for _ in range(4):
        statistics.add_trained([of_length(10, 1.0)] * 3)
        statistics.add_dropped(of_length(30, 0.25))
    row = statistics.end_step()
    assert row == pytest.approx(
        {
            "dropped_groups": 4.0,
            "dropped_share": 0.25,
            "dropped_completion_tokens_mean": 30.0,
            "dropped_reward_mean": 0.25,
            "dropped_length_bias": 1 - 10 / 15,
        }
    )
    later = statistics.end_step()
    assert later == row | {"dropped_groups": 0.0}, "the share and the means are of the last steps"


def test_nothing_dropped_is_no_bias() -> None:
    statistics = DropStatistics()
    statistics.add_trained([of_length(10)])
    assert statistics.end_step() == {"dropped_groups": 0.0, "dropped_share": 0.0, "dropped_length_bias": 0.0}


def test_nothing_trained_says_nothing_of_lengths() -> None:
    statistics = DropStatistics()
    statistics.add_dropped(of_length(10))
    assert statistics.end_step() == {"dropped_groups": 1.0, "dropped_share": 1.0, "dropped_length_bias": 0.0}


@pytest.mark.parametrize(("length", "is_warned"), [(8, False), (10, False), (14, False), (25, True)])
def test_a_tenth_of_the_groups_dropped_is_warned_of_only_if_they_are_long(length: int, is_warned: bool) -> None:
    """Short ones, or as long as the others, are no bias of lengths; and a few tell nothing."""
    statistics = DropStatistics()
    for count in range(1, 9):
        statistics.add_trained([of_length(10)] * 9)
        statistics.add_dropped(of_length(length))
        told = statistics.end_step()["dropped_length_bias"]
        assert BIAS.is_beyond(told, BIAS.warn) == (is_warned and count >= MIN_DROPPED)


def test_what_is_long_ago_no_longer_counts() -> None:
    statistics = DropStatistics()
    statistics.add_dropped(of_length(30))
    shares = []
    for _ in range(WINDOW_STEPS + 1):
        statistics.add_trained([of_length(10)])
        shares.append(statistics.end_step()["dropped_share"])
    assert shares[0] == 0.5 and shares[-2] > 0.0 and shares[-1] == 0.0
