"""The staleness of groups and versions, in steps: pure functions. Versions are only identifiers, never subtracted.

A group's staleness is the learner's step when the group is packed, minus the step that made the oldest version among
its loss tokens; it is at least 0. It is the sum of *in flight* (until the last token was sampled) and *in queue* (from
then on).
"""

from collections.abc import Mapping
from typing import NamedTuple

from headrace.common.wire import Group


class Staleness(NamedTuple):
    in_flight: int
    in_queue: int

    @property
    def total(self) -> int:
        return self.in_flight + self.in_queue


def group_staleness(group: Group, step: int, version_steps: Mapping[int, int]) -> Staleness:
    """`step`: the number of completed steps. `version_steps`: the step that made each version."""
    oldest = min(step_of(group.oldest_version, version_steps), step)
    newest = max(oldest, min(step_of(group.newest_version, version_steps), step))
    return Staleness(in_flight=newest - oldest, in_queue=step - newest)


def version_staleness(version: int, step: int, version_steps: Mapping[int, int]) -> int:
    return max(0, step - step_of(version, version_steps))


def step_of(version: int, version_steps: Mapping[int, int]) -> int:
    """The step that made `version`; if the map lacks it, the step of the newest earlier version; 0 if there is none."""
    if version in version_steps:
        return version_steps[version]
    earlier = [known for known in list(version_steps) if known < version]
    return version_steps[max(earlier)] if earlier else 0
