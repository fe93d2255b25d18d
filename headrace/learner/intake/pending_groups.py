"""Training groups between arrival and training: uniform ones are settled at once, stale ones when they are found."""

import logging
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.wire import Group
from headrace.learner.algorithm.staleness import Staleness, group_staleness, step_of
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.outcomes import GroupOutcomes
from headrace.learner.store.structs import Entry

_log = logging.getLogger(__name__)


class PendingGroup(NamedTuple):
    """A group that waits to be trained, or was picked for a batch."""

    entry: Entry
    group: Group
    staleness: Staleness
    """At the learner's step, as the intake knows it."""


class PendingGroups:
    """In order of arrival. Every method is called with the intake's lock held."""

    def __init__(
        self, config: RunConfig, source: GroupSource, version_steps: Mapping[int, int], outcomes: GroupOutcomes
    ) -> None:
        self.config = config
        self.step = 0
        """The steps that the learner has trained."""
        self.groups: deque[PendingGroup] = deque()
        self._newest: Group | None = None
        """The group that arrived last, whatever its outcome."""
        self._source = source
        self._version_steps = version_steps
        self._outcomes = outcomes

    def add(self, entry: Entry, group: Group) -> bool:
        """False if the group is uniform and therefore settled."""
        self._newest = group
        staleness = self._staleness(group)
        if self.config.actor.dynamic_sampling and group.is_uniform(self.config.actor.truncated):
            self._outcomes.settle(entry, group, "uniform", self.step, staleness.total)
            return False
        self.groups.append(PendingGroup(entry, group, staleness))
        return True

    def advance(self, step: int) -> None:
        self.step = step
        self.groups = deque(one._replace(staleness=self._staleness(one.group)) for one in self.groups)
        self._outcomes.begin_step()

    def drop_stale(self) -> bool:
        """Settles groups beyond max_staleness as stale; each ticket is issued again, once. False if there were none."""
        learner, fresh = self.config.learner, deque[PendingGroup]()
        for pending in self.groups:
            if pending.staleness.total <= learner.max_staleness or learner.stale_policy == "train":
                fresh.append(pending)
                continue
            entry, group, staleness = pending
            self._outcomes.settle(entry, group, "stale", self.step, staleness.total)
            self._source.replace_stale(group.ticket)
            _log.info("stale by %d steps, to be replaced", staleness.total, extra={"ticket": entry.ticket_id})
        has_dropped = len(fresh) < len(self.groups)
        self.groups = fresh
        return has_dropped

    @property
    def has_batch(self) -> bool:
        return len(self.groups) >= self.config.learner.groups_per_step

    def pop_batch(self) -> list[PendingGroup]:
        return [self.groups.popleft() for _ in range(self.config.learner.groups_per_step)]

    def newest_if_fresh(self) -> Group | None:
        """The group that arrived last, if some of its tokens are of the learner's step."""
        if self._newest is None or step_of(self._newest.newest_version, self._version_steps) != self.step:
            return None
        return self._newest

    def _staleness(self, group: Group) -> Staleness:
        return group_staleness(group, self.step, self._version_steps)
