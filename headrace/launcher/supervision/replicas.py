"""The replicas of one launcher, `generation-0` upwards: as many as are ordered, whatever that is from time to time.

More are started, fewer are drained by SIGTERM from the highest number down; who was asked to end is not started again,
and its name is free once it has ended. A replica that cannot be kept is given up, with the reason, as long as another
is there to go on with; the last one raises `ServiceFailed`. The next order tries again.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from headrace.launcher.supervision.replica_target import ReplicaTarget, Target
from headrace.launcher.supervision.restart_policy import ServiceFailed, SupervisedProcess


class _Leaving(NamedTuple):
    kept: SupervisedProcess
    asked_at: float


class Replicas:
    """`start`: the replica of that number, as it starts."""

    def __init__(self, start: Callable[[int], SupervisedProcess], orders: ReplicaTarget) -> None:
        self.orders = orders
        self._start = start
        self._order: Target | None = None
        self._problem = ""
        """Of the latest order."""
        self._kept: dict[int, SupervisedProcess] = {}
        self._given_up: set[int] = set()
        self._leaving: dict[int, _Leaving] = {}

    @property
    def all(self) -> list[SupervisedProcess]:
        """Those that are on their way out included."""
        return [*self._kept.values(), *(leaving.kept for leaving in self._leaving.values())]

    @property
    def is_none_wanted(self) -> bool:
        return self._order is not None and self._order.replicas == 0

    def follow(self) -> Iterator[str]:
        """One look at the orders and at every replica; lines of what happened."""
        yield from self._take_order()
        yield from self._see_off()
        assert self._order is not None
        for index in range(self._order.replicas):
            if index not in self._kept and index not in self._leaving and index not in self._given_up:
                self._kept[index] = self._start(index)
        for index in sorted(self._kept):
            if line := self._keep(index):
                yield line

    def _take_order(self) -> Iterator[str]:
        order = self._order or self.orders.start
        try:
            order = self.orders.look()
            problem = order.shortfall
        except ValueError as error:
            problem = f"an order is not obeyed: {error}"
        if problem and problem != self._problem:
            yield problem
        self._problem = problem
        if self._order is not None and order.replicas == self._order.replicas:
            return
        is_first, self._order = self._order is None, order
        self._given_up.clear()
        if order.replicas == 0:
            yield f"no replicas, {order.origin}: generation is paused until more are ordered (headrace scale)"
        elif not is_first or order != self.orders.start:
            yield f"{order.replicas} replica{'s' * (order.replicas > 1)}, {order.origin}"
        for index in sorted(self._kept, reverse=True):
            if index >= order.replicas:
                kept = self._kept.pop(index)
                kept.service.ask_to_stop()
                self._leaving[index] = _Leaving(kept, time.monotonic())

    def _see_off(self) -> Iterator[str]:
        for index, (kept, asked_at) in list(self._leaving.items()):
            if not kept.is_running:
                del self._leaving[index]
                yield f"{kept.service.name} has left"
            elif time.monotonic() - asked_at > kept.grace_s:
                yield f"{kept.service.name} did not leave within {kept.grace_s:.0f} s: killing it"
                kept.service.kill()

    def _keep(self, index: int) -> str | None:
        try:
            return self._kept[index].keep()
        except ServiceFailed as failure:
            if len(self._kept) == 1:
                raise
            del self._kept[index]
            self._given_up.add(index)
            return f"given up until the next order, the run goes on with {len(self._kept)} of its replicas: {failure}"
