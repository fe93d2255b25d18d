"""Samples of settled groups, for people to read (headrace/common/wire/group_samples.py).

They are bounded: the first few of each state in every step, and of every evaluation.
"""

import time
from collections import Counter
from typing import NamedTuple

import numpy as np

from headrace.common.wire import DecidedState, Group

MAX_SAMPLED = {"trained": 4, "uniform": 1, "stale": 1, "evaluated": 8}


class DecidedGroup(NamedTuple):
    group: Group
    state: DecidedState
    step: int
    staleness: int | None
    decided_s: float


class TrainedRollout(NamedTuple):
    """What the trainer computed for a rollout of its latest step."""

    advantage: float
    proximal_logprobs: np.ndarray


class SampleCollector:
    """Needs a lock around it if several threads use it."""

    def __init__(self) -> None:
        self._waiting: list[DecidedGroup] = []
        self._taken: Counter[str] = Counter()

    def add(self, group: Group, state: DecidedState, step: int, staleness: int | None) -> None:
        if self._taken[state] < MAX_SAMPLED[state]:
            self._taken[state] += 1
            self._waiting.append(DecidedGroup(group, state, step, staleness, time.time()))

    def restart(self, *states: DecidedState) -> None:
        """A step or an evaluation begins: groups of these states are sampled again."""
        for state in states:
            self._taken[state] = 0

    def take(self) -> list[DecidedGroup]:
        waiting, self._waiting = self._waiting, []
        return waiting
