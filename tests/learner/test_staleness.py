"""Staleness against hand-worked examples."""

import msgspec

from headrace.common.wire import VersionSpan
from headrace.learner.algorithm.staleness import Staleness, group_staleness, step_of
from headrace.learner.model.packing import current_version, token_staleness
from tests.support.factories import make_group, make_rollout

STEPS = {1: 0, 2: 1, 3: 2, 7: 3}
"""Versions are identities: after a resume, version 7 was made by step 3."""


def test_the_oldest_token_counts_and_the_newest_splits() -> None:
    spans = [VersionSpan(2, 0, 1), VersionSpan(3, 1, 3)]
    group = msgspec.structs.replace(
        make_group(version=3), rollouts=[make_rollout(version=3), make_rollout(version_spans=spans)]
    )
    assert group_staleness(group, 5, STEPS) == Staleness(in_flight=1, in_queue=3)
    assert group_staleness(group, 5, STEPS).total == 4


def test_versions_are_never_subtracted() -> None:
    assert group_staleness(make_group(version=7), 3, STEPS).total == 0
    assert group_staleness(make_group(version=7), 4, STEPS) == Staleness(0, 1)


def test_a_version_of_a_later_step_is_not_negative() -> None:
    """After a resume from an earlier step, groups of lost versions are at most fresh."""
    assert group_staleness(make_group(version=7), 1, STEPS) == Staleness(0, 0)


def test_a_version_missing_in_the_map_is_as_old_as_the_one_before_it() -> None:
    assert [step_of(version, {3: 7, 5: 9}) for version in (1, 3, 4, 5, 9)] == [0, 7, 7, 9, 9]


def test_per_token() -> None:
    rollout = make_rollout(version_spans=[VersionSpan(1, 0, 1), VersionSpan(7, 1, 3)])
    assert token_staleness(rollout, 4, STEPS, None).tolist() == [4, 1, 1]
    assert token_staleness(rollout, 3, STEPS, 7).tolist() == [3, 0, 0]


def test_a_fresh_token_is_of_the_current_version_and_not_of_another_version_of_the_same_step() -> None:
    """Version 7 was made by the third step, or by the fifth of an earlier start that is lost; 9 is this start's
    third."""
    rollout = make_rollout(version_spans=[VersionSpan(7, 0, 2), VersionSpan(9, 2, 3)])
    for lost in (3, 5):
        steps = {1: 0, 7: lost, 8: 2, 9: 3}
        assert current_version(3, steps) == 9
        assert token_staleness(rollout, 3, steps, 9).tolist() == [1, 1, 0]
    assert current_version(4, {1: 0, 7: 5}) is None
