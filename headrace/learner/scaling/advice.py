"""Advice on the number of replicas that keeps the learner busy, from the measured waits of both sides. Pure.

If n replicas are idle for the share i of their time and the learner waits for the share w of its time, then
n (1 - i) / (1 - w) replicas would be enough without a wait, assuming that an added replica is as fast as the existing
ones. Fewer are advised down to that number, or one fewer if the groups in flight fit on them. Shares are measured over
a window of at least `WINDOW_S` and `MIN_STEPS` steps, which restarts whenever the set of replicas or the advice
changes. To avoid flapping, more are advised only above `MORE_ABOVE`, fewer only below `FEWER_BELOW`, and never a
number that was too few within the last `TOO_FEW_MEMORY_S`.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from headrace.common.wire import Heartbeat

WINDOW_S = 60.0
MIN_STEPS = 3
MORE_ABOVE, FEWER_BELOW = 0.2, 0.1
"""Shares of the learner's time that it waits for groups."""
TARGET_WAIT_SHARE = 0.05
"""The share of the learner's time that it should wait for groups with the advised number."""
MAX_FACTOR = 2
"""The advised number is at most this multiple of the running one."""
MAX_SLOT_USE = 0.8
"""One replica fewer is advised if the groups in flight fill at most this share of the remaining slots."""
TOO_FEW_MEMORY_S = 3600.0
"""How long a number of replicas that was too few is not advised again."""
MIN_GAIN_SHARE = 0.25
"""Added replicas that bring less than this share of the expected gain in groups per second count as no gain."""


class Advice(NamedTuple):
    replicas: int
    reason: str


class _Interval(NamedTuple):
    """Measurements between two observations; those of replicas are sums over all replicas."""

    waited_s: float
    worked_s: float
    idle_s: float
    serving_s: float
    num_groups: float
    in_flight_s: float
    """Groups in flight times seconds."""

    @property
    def lasted_s(self) -> float:
        return self.waited_s + self.worked_s


class ReplicaAdviser:
    """Advises a learner. The advice is `start` until enough is measured, and at most `max_replicas`."""

    def __init__(self, start: int, max_replicas: int, max_groups_in_flight: int) -> None:
        """`max_groups_in_flight`: the number of slots of a replica."""
        self.advice = Advice(max(1, min(start, max_replicas)), "nothing has been measured yet")
        self._max_replicas = max_replicas
        self._num_slots = max_groups_in_flight
        self._running: dict[str, Heartbeat] = {}
        self._window: deque[_Interval] = deque()
        self._observed_s = 0.0
        self._too_few: tuple[int, float] = (0, 0.0)
        """The latest number of replicas that was too few, and when it was found to be."""
        self._before: tuple[int, float] | None = None
        """Replicas and groups per second when more were advised; None once their gain is known."""
        self._no_gain_at = 0
        """The number of replicas that was reached without a gain."""

    def observe(self, waited_s: float, worked_s: float, replicas: Iterable[Heartbeat], steps_in_queue: float) -> Advice:
        """The advice after an interval in which the learner waited for groups or worked on a step (0 s each: neither).

        `steps_in_queue`: the mean number of steps between the last token of a group of the latest batch and its
        packing.
        """
        running = {replica.replica: replica for replica in replicas if replica.state == "running"}
        if running.keys() != self._running.keys():
            self._window.clear()
        elif waited_s + worked_s > 0:
            self._window.append(_measured(waited_s, worked_s, self._running, running))
            self._observed_s += waited_s + worked_s
            while self._is_full(leaving_out=1):
                self._window.popleft()
        self._running = running
        before, self.advice = self.advice, self._advise(steps_in_queue)
        if self.advice.replicas != before.replicas:
            self._window.clear()
        return self.advice

    def _is_full(self, leaving_out: int = 0) -> bool:
        """Whether the window is long enough without its `leaving_out` oldest intervals."""
        intervals = list(self._window)[leaving_out:]
        num_steps = sum(interval.worked_s > 0 for interval in intervals)
        return num_steps >= MIN_STEPS and sum(interval.lasted_s for interval in intervals) >= WINDOW_S

    def _advise(self, steps_in_queue: float) -> Advice:
        count = len(self._running)
        if not self._running or not self._is_full():
            return self.advice
        total = _Interval(*(sum(values) for values in zip(*self._window, strict=True)))
        waiting, idle = total.waited_s / total.lasted_s, min(1.0, total.idle_s / max(total.serving_s, 1e-9))
        needed = count * (1 - idle) / max(1 - waiting, 1 / (2 * MAX_FACTOR))
        enough, standing = max(1, math.ceil(needed * (1 - TARGET_WAIT_SHARE))), self.advice.replicas
        reason = f"the learner waits {waiting:.0%} of its time for groups, replicas {idle:.0%} of theirs for tickets"
        self._note_gain(count, total.num_groups / total.lasted_s)
        if waiting >= MORE_ABOVE:
            limit = self._why_not_more(count, enough, steps_in_queue)
            if limit:
                return Advice(count, f"{reason}: {limit}")
            self._too_few = (count, self._observed_s)
            self._before = (count, total.num_groups / total.lasted_s)
            enough = max(standing, min(enough, MAX_FACTOR * count))
        elif waiting >= FEWER_BELOW:
            enough = max(standing, count)
        else:
            fits = total.in_flight_s / total.lasted_s <= MAX_SLOT_USE * self._num_slots * (count - 1)
            enough = min(enough, standing, count - 1 if fits else count)
            enough = max(enough, min(count, self._min_needed()), 1)
        return Advice(min(enough, self._max_replicas), reason)

    def _min_needed(self) -> int:
        """The number of replicas that is known to be needed."""
        count, found_at_s = self._too_few
        return count + 1 if self._observed_s - found_at_s < TOO_FEW_MEMORY_S else 1

    def _note_gain(self, count: int, rate: float) -> None:
        """Notes whether the replicas added last have brought a gain; `rate` in groups per second."""
        if self._before is not None and count > self._before[0]:
            earlier, rate_before = self._before
            is_no_gain = rate < rate_before * (1 + MIN_GAIN_SHARE * (count / earlier - 1))
            self._no_gain_at, self._before = count if is_no_gain else 0, None

    def _why_not_more(self, count: int, enough: int, steps_in_queue: float) -> str:
        """Why no more replicas are advised although the learner waits; empty if more are advised."""
        if count >= self._max_replicas:
            return "generation.max_replicas are running"
        if enough <= count:
            return "both wait for each other"
        if steps_in_queue >= 1:
            return f"groups have waited {steps_in_queue:.1f} steps for it"
        return "the latest replicas have brought hardly any more groups" if count == self._no_gain_at else ""


def _measured(waited_s: float, worked_s: float, before: dict[str, Heartbeat], now: dict[str, Heartbeat]) -> _Interval:
    same_lives = [(before[name], beat) for name, beat in now.items() if beat.serving_s >= before[name].serving_s]
    return _Interval(
        waited_s,
        worked_s,
        idle_s=sum(max(0.0, beat.waiting_s - earlier.waiting_s) for earlier, beat in same_lives),
        serving_s=sum(beat.serving_s - earlier.serving_s for earlier, beat in same_lives),
        num_groups=sum(max(0, beat.groups_committed - earlier.groups_committed) for earlier, beat in same_lives),
        in_flight_s=sum(beat.groups_in_flight for beat in now.values()) * (waited_s + worked_s),
    )
