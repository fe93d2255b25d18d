"""The replicas of one launcher, `generation-0` upwards: as many as the target says, which may change at any time.

More replicas are started. Fewer are drained by SIGTERM, from the highest number down; a drained replica is not
restarted, and its name is free once it has ended. A replica that keeps failing is given up, with the reason, as long
as another one remains; the last one raises `ServiceFailed`. The next change of the target tries again.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from headrace.launcher.supervision.replica_target import ReplicaTarget, Target
from headrace.launcher.supervision.restart_policy import ServiceFailed, SupervisedProcess


class _Draining(NamedTuple):
    process: SupervisedProcess
    asked_at: float


class Replicas:
    """`start` starts the replica with the given number."""

    def __init__(self, start: Callable[[int], SupervisedProcess], target: ReplicaTarget) -> None:
        self.target = target
        self._start = start
        self._latest: Target | None = None
        self._problem = ""
        """The problem with the latest target; empty if there is none."""
        self._running: dict[int, SupervisedProcess] = {}
        self._given_up: set[int] = set()
        self._draining: dict[int, _Draining] = {}

    @property
    def all(self) -> list[SupervisedProcess]:
        """All processes, including those that are draining."""
        return [*self._running.values(), *(draining.process for draining in self._draining.values())]

    @property
    def is_target_zero(self) -> bool:
        return self._latest is not None and self._latest.replicas == 0

    def reconcile(self) -> Iterator[str]:
        """Reads the target and looks after every replica once; yields lines about what happened."""
        yield from self._read_target()
        yield from self._end_draining()
        assert self._latest is not None
        for index in range(self._latest.replicas):
            if index not in self._running and index not in self._draining and index not in self._given_up:
                self._running[index] = self._start(index)
        for index in sorted(self._running):
            if line := self._restart_if_ended(index):
                yield line

    def _read_target(self) -> Iterator[str]:
        target = self._latest or self.target.start
        try:
            target = self.target.poll()
            problem = target.shortfall
        except ValueError as error:
            problem = f"the replica target is ignored: {error}"
        if problem and problem != self._problem:
            yield problem
        self._problem = problem
        if self._latest is not None and target.replicas == self._latest.replicas:
            return
        is_first, self._latest = self._latest is None, target
        self._given_up.clear()
        if target.replicas == 0:
            yield f"no replicas, {target.origin}: generation is paused until more are requested (headrace scale)"
        elif not is_first or target != self.target.start:
            yield f"{target.replicas} replica{'s' * (target.replicas > 1)}, {target.origin}"
        self._drain_from(target.replicas)

    def _drain_from(self, number: int) -> None:
        for index in sorted(self._running, reverse=True):
            if index >= number:
                process = self._running.pop(index)
                process.service.ask_to_stop()
                self._draining[index] = _Draining(process, time.monotonic())

    def _end_draining(self) -> Iterator[str]:
        for index, (process, asked_at) in list(self._draining.items()):
            if not process.is_running:
                del self._draining[index]
                yield f"{process.service.name} has left"
            elif time.monotonic() - asked_at > (grace_s := process.drain_s + process.grace_s):
                yield f"{process.service.name} did not leave within {grace_s:.0f} s: killing it"
                process.service.kill()

    def _restart_if_ended(self, index: int) -> str | None:
        try:
            return self._running[index].restart_if_ended()
        except ServiceFailed as failure:
            if len(self._running) == 1:
                raise
            del self._running[index]
            self._given_up.add(index)
            left = len(self._running)
            return f"given up until the target changes, the run goes on with {left} of its replicas: {failure}"
