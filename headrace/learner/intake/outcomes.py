"""Accounts for every settled group: its settlement, its rewards, a sample of it, and statistics of dropped ones."""

from headrace.common.wire import DecidedState, Group
from headrace.learner.intake.dropped import DropStatistics
from headrace.learner.intake.lock import IntakeLock
from headrace.learner.intake.samples import DecidedGroup, SampleCollector
from headrace.learner.intake.settlements import SettlementLog
from headrace.learner.store.structs import Entry


class GroupOutcomes:
    """The methods that take something away lock; the others are called with the lock held."""

    def __init__(self, settlement_log: SettlementLog, lock: IntakeLock) -> None:
        self._settlement_log = settlement_log
        self._lock = lock
        self._rewards: list[float] = []
        self._samples = SampleCollector()
        self._drop_statistics = DropStatistics()

    def settle(self, entry: Entry, group: Group, state: DecidedState, step: int, staleness: int | None) -> None:
        """`step`: the learner's now; `staleness`: in steps, None for an evaluation group."""
        self._settlement_log.consume(entry, group, state)
        self._samples.add(group, state, step, staleness)
        if state != "evaluated":
            self._rewards += group.rewards
        if state == "trained":
            self._drop_statistics.add_trained([group])
        elif state == "stale":
            self._drop_statistics.add_dropped(group)

    def reject(self, group: Group | None) -> None:
        """`group`: None if it could not be decoded."""
        self._settlement_log.counts["dead"] += 1  # its ticket may be alive: the group may be a duplicate
        if group is not None and group.ticket.kind == "train":
            self._drop_statistics.add_dropped(group)

    def begin_step(self) -> None:
        self._samples.restart("trained", "uniform", "stale")

    def begin_evaluation(self) -> None:
        self._samples.restart("evaluated")

    def take_rewards(self) -> list[float]:
        """The rewards of all training completions settled since the last call: trained, uniform and stale ones."""
        with self._lock:
            rewards, self._rewards = self._rewards, []
            return rewards

    def take_drop_statistics(self) -> dict[str, float]:
        """The metrics of `DropStatistics` for the step that is over."""
        with self._lock:
            return self._drop_statistics.end_step()

    def take_samples(self) -> list[DecidedGroup]:
        """A sample of the groups settled since the last call."""
        with self._lock:
            return self._samples.take()
