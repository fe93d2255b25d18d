"""Draws the faults of a seed: the same seed, number and kinds give the same schedule everywhere. Pure.

Every kind occurs equally often, give or take one, in a shuffled order; one that is listed twice occurs twice as often.
Every fourth fault is injected without waiting for the recovery from the one before, if two can be found that hit
different parts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

OVERLAP_EVERY = 4
MAX_PAUSE_S = 2.0
DELAY_S = (0.05, 0.3)


class Kind(StrEnum):
    KILL_LEARNER = "kill_learner"
    FREEZE_LEARNER = "freeze_learner"
    REPLACE_LEARNER = "replace_learner"
    """The learner is frozen until its replacement runs, then woken."""
    KILL_REPLICA = "kill_replica"
    FREEZE_REPLICA = "freeze_replica"
    KILL_ENGINE = "kill_engine"
    FREEZE_ENGINE = "freeze_engine"
    KILL_REDIS = "kill_redis"
    FREEZE_REDIS = "freeze_redis"
    CUT_CONNECTIONS = "cut_connections"
    """All connections to Redis are reset, and new ones refused for a while."""
    DELAY_CONNECTIONS = "delay_connections"
    STALL_CONNECTIONS = "stall_connections"
    """New ones are accepted; what is sent arrives when the stall ends, even from clients that have given up."""
    FILL_DISK = "fill_disk"
    TRUNCATE_CHECKPOINT = "truncate_checkpoint"
    """The newest checkpoint is truncated and the learner killed."""
    KILL_ENVIRONMENT_WORKER = "kill_environment_worker"
    FREEZE_ENVIRONMENT_WORKER = "freeze_environment_worker"
    KILL_AGENT = "kill_agent"
    """A program that an episode has started, in the middle of the episode."""


EPISODE_KINDS = (Kind.KILL_ENVIRONMENT_WORKER, Kind.FREEZE_ENVIRONMENT_WORKER, Kind.KILL_AGENT)
"""Only of runs that play episodes."""
KINDS = tuple(kind for kind in Kind if kind not in EPISODE_KINDS)
"""Of every run."""


PARTS = {
    Kind.KILL_LEARNER: "learner",
    Kind.FREEZE_LEARNER: "learner",
    Kind.REPLACE_LEARNER: "learner",
    Kind.KILL_REPLICA: "replica",
    Kind.FREEZE_REPLICA: "replica",
    Kind.KILL_ENGINE: "replica",
    Kind.FREEZE_ENGINE: "replica",
    Kind.KILL_REDIS: "redis",
    Kind.FREEZE_REDIS: "redis",
    Kind.CUT_CONNECTIONS: "connections",
    Kind.DELAY_CONNECTIONS: "connections",
    Kind.STALL_CONNECTIONS: "connections",
    Kind.FILL_DISK: "disk",
    Kind.TRUNCATE_CHECKPOINT: "learner",
    Kind.KILL_ENVIRONMENT_WORKER: "environment",
    Kind.FREEZE_ENVIRONMENT_WORKER: "environment",
    Kind.KILL_AGENT: "environment",
}
HOLD_S = {
    Kind.FREEZE_LEARNER: (2.0, 20.0),
    Kind.FREEZE_REPLICA: (2.0, 20.0),
    Kind.FREEZE_ENGINE: (13.0, 20.0),  # the replica's watchdog has restarted it by then
    Kind.KILL_REDIS: (0.0, 3.0),
    Kind.FREEZE_REDIS: (2.0, 6.0),
    Kind.CUT_CONNECTIONS: (1.0, 8.0),
    Kind.DELAY_CONNECTIONS: (3.0, 8.0),
    Kind.STALL_CONNECTIONS: (3.0, 14.0),  # Redis clients give up after 10
    Kind.FILL_DISK: (20.0, 30.0),  # or until the learner says that it cannot write
    Kind.FREEZE_ENVIRONMENT_WORKER: (5.0, 40.0),  # its replica may have ended it by then
}
"""How long a lasting fault lasts; for a killed Redis, how long it is away."""


@dataclass(frozen=True)
class Fault:
    number: int
    """Starts at 1."""
    kind: Kind
    pause_s: float
    """Pause before it, after the recovery from the previous fault (or its injection, if this one overlaps it)."""
    overlaps: bool
    """Injected without waiting for the recovery from the previous one."""
    hold_s: float
    choice: float
    """In [0, 1): chooses among several targets."""
    place: float
    """In [0, 1): where a file is truncated."""
    delay_s: float
    """Delay of every chunk, for delayed connections."""

    def choose(self, num_targets: int) -> int:
        return int(self.choice * num_targets)


def schedule(seed: int, num_faults: int, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    rng = random.Random(f"{seed} {num_faults} {','.join(kinds)}")
    rounds, rest = divmod(num_faults, len(kinds))
    order = list(kinds) * rounds + rng.sample(list(kinds), rest)
    rng.shuffle(order)
    overlapping = _arrange_overlaps(order)
    return [_draw(rng, index + 1, kind, index in overlapping) for index, kind in enumerate(order)]


def _arrange_overlaps(order: list[Kind]) -> set[int]:
    """The indices of faults that overlap the previous one; reorders `order` so that there are some."""
    overlapping = set()
    for place in range(OVERLAP_EVERY - 1, len(order), OVERLAP_EVERY):
        if order[place - 1] is Kind.REPLACE_LEARNER:
            order[place - 2], order[place - 1] = order[place - 1], order[place - 2]
        later = (other for other in range(place, len(order)) if _may_overlap(order[place - 1], order[other]))
        partner = next(later, None)
        if partner is not None:
            order[place], order[partner] = order[partner], order[place]
            overlapping.add(place)
    return overlapping


def _may_overlap(first: Kind, second: Kind) -> bool:
    """A replacement is a sequence of its own that no other fault may interrupt."""
    return Kind.REPLACE_LEARNER not in (first, second) and PARTS[first] != PARTS[second]


def _draw(rng: random.Random, number: int, kind: Kind, overlaps: bool) -> Fault:
    return Fault(
        number=number,
        kind=kind,
        pause_s=round(rng.uniform(0.0, MAX_PAUSE_S), 3),
        overlaps=overlaps,
        hold_s=round(rng.uniform(*HOLD_S.get(kind, (0.0, 0.0))), 3),
        choice=rng.random(),
        place=rng.random(),
        delay_s=round(rng.uniform(*DELAY_S), 3),
    )
