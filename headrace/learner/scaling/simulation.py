"""Discrete-event simulation of the loop: how long replicas and learner wait, given the durations of groups and steps.

Admission, slots, dynamic sampling and staleness follow the protocol. Simplifications: a group's duration does not
depend on the number of groups that its replica processes, weight swaps take no time, and nothing fails. The same seed
gives the same result.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.common.wire import Heartbeat

POLL_S = 1.0
"""Interval at which a waiting learner reports its wait."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run's measured durations and its configuration."""

    group_durations_s: Sequence[float]
    """Durations of groups, each from its lease until it was scored."""
    work_s: Sequence[float]
    """Durations of steps without their waits."""
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
    """Totals since the simulation began."""

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
    """`observe(waited_s, worked_s, heartbeats)` is called after every interval of the learner's time, like
    `ReplicaAdviser.observe`."""

    measured: MeasuredRun
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
        """The steps at which each queued group was leased and scored."""
        self.steps_in_queue = 0.0
        """The latest batch's mean number of steps in the queue."""
        self._num_requests = 0
        self._waiting_since: float | None = 0.0
        self._replicas: list[_Replica] = []
        self.set_replicas(self.num_replicas)
        self._update()
        self._poll()

    @property
    def num_running(self) -> int:
        return len(self._replicas)

    def run(self, until_s: float) -> Totals:
        """Simulates up to the time `until_s`, in simulated seconds; returns the totals."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self.now = until_s
        beats = self.heartbeats()
        self.totals.idle_s = sum(beat.waiting_s for beat in beats)
        self.totals.serving_s = sum(beat.serving_s for beat in beats)
        return self.totals

    def request_replicas(self, count: int, startup_s: float) -> None:
        """Changes the number of replicas: to more after `startup_s`, to fewer at once. A later request replaces it."""
        self._num_requests += 1
        self._schedule(startup_s if count > self.num_running else 0.0, self._apply_request, self._num_requests, count)

    def _apply_request(self, request: int, count: int) -> None:
        if request == self._num_requests:
            self.set_replicas(count)

    def set_replicas(self, count: int) -> None:
        """Changes the number of replicas at once; those that leave hand their tickets back."""
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

    def _schedule(self, duration_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + duration_s, self._num_events, act, arguments))

    def _update(self) -> None:
        """Drops stale groups, admits and leases tickets, and begins a step if a batch is complete."""
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
        """Leases each open ticket to the replica with the fewest groups in flight."""
        while self._open and self._replicas:
            replica = min(self._replicas, key=lambda one: one.num_in_flight)
            if replica.num_in_flight == self.measured.max_groups_in_flight:
                break
            if replica.num_in_flight == 0:
                replica.idle_s += self.now - replica.idle_since
            replica.num_in_flight += 1
            self._open -= 1
            duration_s = self._random.choice(self.measured.group_durations_s)
            self._schedule(duration_s, self._finish, replica, self.totals.steps)

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
        self._update()

    def _begin_step(self) -> None:
        batch, step = [self._queued.popleft() for _ in range(self.measured.groups_per_step)], self.totals.steps
        self.totals.staleness += sum(step - leased for leased, _ in batch)
        self.totals.num_trained += len(batch)
        self.steps_in_queue = sum(step - scored for _, scored in batch) / len(batch)
        self._report_wait()
        self._waiting_since = None
        work_s = self._random.choice(self.measured.work_s)
        self._schedule(work_s, self._end_step, work_s)

    def _end_step(self, work_s: float) -> None:
        self.totals.steps += 1
        self.totals.worked_s += work_s
        self._outstanding -= self.measured.groups_per_step
        self.observe(0.0, work_s, self.heartbeats())
        self._waiting_since = self.now
        self._update()

    def _poll(self) -> None:
        if self._waiting_since is not None:
            self._report_wait()
        self._schedule(POLL_S, self._poll)

    def _report_wait(self) -> None:
        assert self._waiting_since is not None
        waited_s, self._waiting_since = self.now - self._waiting_since, self.now
        self.totals.waited_s += waited_s
        self.observe(waited_s, 0.0, self.heartbeats())
