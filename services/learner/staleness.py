"""How stale a group is, in steps: pure functions. Weight versions are identities and never subtracted.

Staleness = the learner's step when the group is packed - the step that made the oldest version among its loss
tokens, at least 0. It splits into *in flight* (until the last token was sampled) and *in queue* (from then on).
"""

from collections.abc import Mapping
from typing import NamedTuple

from common.wire import Group


class Staleness(NamedTuple):
    in_flight: int
    in_queue: int

    @property
    def total(self) -> int:
        return self.in_flight + self.in_queue


def group_staleness(group: Group, step: int, version_steps: Mapping[int, int]) -> Staleness:
    """`step`: how many steps the learner has completed. `version_steps`: which step made a version.

    Raises `ValueError` if a version is not in the map: it never existed.
    """
    for version in (group.oldest_version, group.newest_version):
        if version not in version_steps:
            raise ValueError(f"group {group.ticket.id} was sampled by version {version}, which was never published")
    oldest = min(version_steps[group.oldest_version], step)
    newest = max(oldest, min(version_steps[group.newest_version], step))
    return Staleness(in_flight=newest - oldest, in_queue=step - newest)


def rollout_staleness(oldest_version: int, step: int, version_steps: Mapping[int, int]) -> int:
    return max(0, step - version_steps[oldest_version])
