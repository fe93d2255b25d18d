"""The loop as a discrete-event simulation: what replicas and learner would wait for, if durations are as given.

Admission, slots, dynamic sampling and staleness follow the protocol. Simplified: a group's duration does not depend on
how many others its replica works on, every weight swap is instant, and nothing fails. Seeded: the same every time.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.common.wire import Heartbeat

LOOK_S = 1.0
"""Between two looks of a learner that waits."""


@dataclass(frozen=True)
class Measured:
    """What a run has measured and how it is configured."""

    group_durations_s: Sequence[float]
    """From a group's lease until it was scored."""
    work_s: Sequence[float]
    """Of a step, without its wait."""
    uniform_share: float
    groups_per_step: int
    max_staleness: int
    max_outstanding_groups: int
    max_groups_in_flight: int


@dataclass
class _Replica:
    name: str
    began_s: float
    num_in_flight: int = 0
    num_committed: int = 0
    idle_s: float = 0.0
    idle_since: float = 0.0
    is_gone: bool = False


@dataclass
class Totals:
    """Since the simulation began."""

    steps: int = 0
    waited_s: float = 0.0
    worked_s: float = 0.0
    idle_s: float = 0.0
    serving_s: float = 0.0
    staleness: float = 0.0
    """Sum of the staleness of all trained groups."""
    num_trained: int = 0
    num_stale: int = 0


@dataclass
class Simulation:
    """`observe(waited_s, worked_s, heartbeats)` is told of every stretch of the learner's time, as its adviser is."""

    measured: Measured
    num_replicas: int
    seed: int = 0
    observe: Callable[[float, float, list[Heartbeat]], object] = lambda *_: None
    now: float = 0.0
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = self._num_names = 0
        self._open = self._outstanding = 0
        self._queued: deque[tuple[int, int]] = deque()
        """At which step each was leased, and scored."""
        self.steps_in_queue = 0.0
        """Of the latest batch, in the mean."""
        self._num_orders = 0
        self._waiting_since: float | None = 0.0
        self._replicas: list[_Replica] = []
        self.scale(self.num_replicas)
        self._turn()
        self._look()

    @property
    def num_running(self) -> int:
        return len(self._replicas)

    def run(self, until_s: float) -> Totals:
        """Goes on up to that time, in simulated seconds."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self.now = until_s
        beats = self.heartbeats()
        self.totals.idle_s = sum(beat.waiting_s for beat in beats)
        self.totals.serving_s = sum(beat.serving_s for beat in beats)
        return self.totals

    def order(self, count: int, startup_s: float) -> None:
        """More are there after `startup_s`, fewer at once; the latest order is the one that counts."""
        self._num_orders += 1
        self._after(startup_s if count > self.num_running else 0.0, self._obey, self._num_orders, count)

    def _obey(self, order: int, count: int) -> None:
        if order == self._num_orders:
            self.scale(count)

    def scale(self, count: int) -> None:
        """At once; who leaves hands its tickets back."""
        while len(self._replicas) > count:
            replica = self._replicas.pop()
            replica.is_gone = True
            self._open += replica.num_in_flight
        while len(self._replicas) < count:
            self._num_names += 1
            self._replicas.append(_Replica(f"replica-{self._num_names}", self.now, idle_since=self.now))
        self._lease()

    def heartbeats(self) -> list[Heartbeat]:
        return [
            Heartbeat(
                replica=one.name,
                url="http://127.0.0.1:1",
                state="running",
                reason="",
                weight_version=1,
                groups_in_flight=one.num_in_flight,
                groups_committed=one.num_committed,
                tokens_generated=0,
                waiting_s=one.idle_s + (0.0 if one.num_in_flight else self.now - one.idle_since),
                serving_s=self.now - one.began_s,
            )
            for one in self._replicas
        ]

    def _after(self, duration_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + duration_s, self._num_events, act, arguments))

    def _turn(self) -> None:
        """What is stale is dropped; then admission, leases, and a step if a batch is there."""
        fresh = [one for one in self._queued if self.totals.steps - one[0] <= self.measured.max_staleness]
        num_stale = len(self._queued) - len(fresh)
        self._queued = deque(fresh)
        self.totals.num_stale += num_stale
        self._outstanding -= num_stale
        room = self.measured.max_outstanding_groups - self._outstanding
        self._open += room
        self._outstanding += room
        self._lease()
        if self._waiting_since is not None and len(self._queued) >= self.measured.groups_per_step:
            self._begin_step()

    def _lease(self) -> None:
        """Each ticket goes to the replica that holds the fewest."""
        while self._open and self._replicas:
            replica = min(self._replicas, key=lambda one: one.num_in_flight)
            if replica.num_in_flight == self.measured.max_groups_in_flight:
                break
            if replica.num_in_flight == 0:
                replica.idle_s += self.now - replica.idle_since
            replica.num_in_flight += 1
            self._open -= 1
            self._after(self._random.choice(self.measured.group_durations_s), self._finish, replica, self.totals.steps)

    def _finish(self, replica: _Replica, leased_at_step: int) -> None:
        if replica.is_gone:
            return
        replica.num_in_flight -= 1
        replica.num_committed += 1
        if replica.num_in_flight == 0:
            replica.idle_since = self.now
        if self._random.random() < self.measured.uniform_share:
            self._outstanding -= 1
        else:
            self._queued.append((leased_at_step, self.totals.steps))
        self._turn()

    def _begin_step(self) -> None:
        batch, step = [self._queued.popleft() for _ in range(self.measured.groups_per_step)], self.totals.steps
        self.totals.staleness += sum(step - leased for leased, _ in batch)
        self.totals.num_trained += len(batch)
        self.steps_in_queue = sum(step - scored for _, scored in batch) / len(batch)
        self._tell_waited()
        self._waiting_since = None
        work_s = self._random.choice(self.measured.work_s)
        self._after(work_s, self._end_step, work_s)

    def _end_step(self, work_s: float) -> None:
        self.totals.steps += 1
        self.totals.worked_s += work_s
        self._outstanding -= self.measured.groups_per_step
        self.observe(0.0, work_s, self.heartbeats())
        self._waiting_since = self.now
        self._turn()

    def _look(self) -> None:
        if self._waiting_since is not None:
            self._tell_waited()
        self._after(LOOK_S, self._look)

    def _tell_waited(self) -> None:
        assert self._waiting_since is not None
        waited_s, self._waiting_since = self.now - self._waiting_since, self.now
        self.totals.waited_s += waited_s
        self.observe(waited_s, 0.0, self.heartbeats())
