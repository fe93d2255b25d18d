"""How many replicas would keep the learner busy: advice from what both sides are measured to wait for. Pure.

More: n replicas, idle for the share i of their time, feed a learner that waits for the share w of its own, so
n (1 - i) / (1 - w) would feed it without a wait, if another does as much as the others. Fewer: as many as that, or one
less where the groups in flight fit. Shares are over a window of at least `WINDOW_S` and `MIN_STEPS` steps, begun anew
whenever other replicas run or the advice changes. It does not flap: more only above `MORE_ABOVE`, fewer only below
`FEWER_BELOW`, and never back to a number that was too few in the last `REMEMBERED_S`.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from headrace.common.wire import Heartbeat

WINDOW_S = 60.0
MIN_STEPS = 3
MORE_ABOVE, FEWER_BELOW = 0.2, 0.1
"""Of the learner's time, spent waiting for groups."""
LEFT_WAITING = 0.05
"""What the number that is advised aims at."""
MAX_FACTOR = 2
"""More is not advised at one time."""
MAX_FILLED = 0.8
"""Of the slots, by the groups in flight, where one replica less is advised."""
REMEMBERED_S = 3600.0
ENOUGH_GAIN = 0.25
"""Of the gain in groups per second that as many replicas more should bring; with less, they were added in vain."""


class Advice(NamedTuple):
    replicas: int
    reason: str


class _Stretch(NamedTuple):
    """What was measured between two looks; the replicas' are sums over all of them."""

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


class Adviser:
    """Of one learner. `start` replicas are advised until something has been measured, `max_replicas` at most."""

    def __init__(self, start: int, max_replicas: int, max_groups_in_flight: int) -> None:
        """`max_groups_in_flight`: slots of a replica."""
        self.advice = Advice(max(1, min(start, max_replicas)), "nothing has been measured yet")
        self._max_replicas = max_replicas
        self._num_slots = max_groups_in_flight
        self._running: dict[str, Heartbeat] = {}
        self._window: deque[_Stretch] = deque()
        self._observed_s = 0.0
        self._too_few: tuple[int, float] = (0, 0.0)
        """A number of replicas, and when it was found to be too few."""
        self._before: tuple[int, float] | None = None
        """Replicas and groups per second when more were advised; None once that has been judged."""
        self._in_vain = 0
        """The number of replicas of which the latest have brought hardly anything."""

    def observe(self, waited_s: float, worked_s: float, replicas: Iterable[Heartbeat], steps_in_queue: float) -> Advice:
        """After a stretch in which the learner waited for groups, or worked on a step, or did neither (0 seconds).

        `steps_in_queue`: of the latest batch's groups, in the mean, between their last token and their packing.
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
        """The window without its oldest stretches."""
        kept = list(self._window)[leaving_out:]
        num_steps = sum(stretch.worked_s > 0 for stretch in kept)
        return num_steps >= MIN_STEPS and sum(stretch.lasted_s for stretch in kept) >= WINDOW_S

    def _advise(self, steps_in_queue: float) -> Advice:
        count = len(self._running)
        if not self._running or not self._is_full():
            return self.advice
        total = _Stretch(*(sum(values) for values in zip(*self._window, strict=True)))
        waiting, idle = total.waited_s / total.lasted_s, min(1.0, total.idle_s / max(total.serving_s, 1e-9))
        needed = count * (1 - idle) / max(1 - waiting, 1 / (2 * MAX_FACTOR))
        enough, standing = max(1, math.ceil(needed * (1 - LEFT_WAITING))), self.advice.replicas
        reason = f"the learner waits {waiting:.0%} of its time for groups, replicas {idle:.0%} of theirs for tickets"
        self._judge(count, total.num_groups / total.lasted_s)
        if waiting >= MORE_ABOVE:
            limit = self._limit(count, enough, steps_in_queue)
            if limit:
                return Advice(count, f"{reason}: {limit}")
            self._too_few = (count, self._observed_s)
            self._before = (count, total.num_groups / total.lasted_s)
            enough = max(standing, min(enough, MAX_FACTOR * count))
        elif waiting >= FEWER_BELOW:
            enough = max(standing, count)
        else:
            fits = total.in_flight_s / total.lasted_s <= MAX_FILLED * self._num_slots * (count - 1)
            enough = min(enough, standing, count - 1 if fits else count)
            enough = max(enough, min(count, self._least()), 1)
        return Advice(min(enough, self._max_replicas), reason)

    def _least(self) -> int:
        """Replicas that are known to be needed."""
        count, found_at_s = self._too_few
        return count + 1 if self._observed_s - found_at_s < REMEMBERED_S else 1

    def _judge(self, count: int, rate: float) -> None:
        """What the latest replicas have brought."""
        if self._before is not None and count > self._before[0]:
            earlier, rate_before = self._before
            is_in_vain = rate < rate_before * (1 + ENOUGH_GAIN * (count / earlier - 1))
            self._in_vain, self._before = count if is_in_vain else 0, None

    def _limit(self, count: int, enough: int, steps_in_queue: float) -> str:
        """Why more replicas are not advised to a learner that waits; empty if they are."""
        if count >= self._max_replicas:
            return "generation.max_replicas are running"
        if enough <= count:
            return "both wait for each other"
        if steps_in_queue >= 1:
            return f"groups have waited {steps_in_queue:.1f} steps for it"
        return "the latest replicas have brought hardly any more groups" if count == self._in_vain else ""


def _measured(waited_s: float, worked_s: float, before: dict[str, Heartbeat], now: dict[str, Heartbeat]) -> _Stretch:
    same_lives = [(before[name], beat) for name, beat in now.items() if beat.serving_s >= before[name].serving_s]
    return _Stretch(
        waited_s,
        worked_s,
        idle_s=sum(max(0.0, beat.waiting_s - earlier.waiting_s) for earlier, beat in same_lives),
        serving_s=sum(beat.serving_s - earlier.serving_s for earlier, beat in same_lives),
        num_groups=sum(max(0, beat.groups_committed - earlier.groups_committed) for earlier, beat in same_lives),
        in_flight_s=sum(beat.groups_in_flight for beat in now.values()) * (waited_s + worked_s),
    )
