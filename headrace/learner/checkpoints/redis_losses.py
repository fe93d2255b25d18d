"""Finds out from a checkpoint whether Redis has lost the run since."""

import time
from collections import Counter
from collections.abc import Collection
from typing import get_args

from headrace.common.wire import DecidedState
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss


def losses_so_far(record: CheckpointRecord, versions: Collection[int]) -> list[RedisLoss]:
    """The losses that the newest checkpoint records, and one more if Redis, which has `versions`, has none of its
    versions. The ledger then has entries of what this checkpoint and the one before recorded, and of what follows."""
    if not record.version_steps or not record.version_steps.keys().isdisjoint(versions):
        return list(record.losses)
    known = Counter[str](one.state for one in (*record.earlier, *record.settlements))
    forgotten = {state: record.counts.get(state, 0) - known[state] for state in get_args(DecidedState)}
    return [*record.losses, RedisLoss(record.step, len(record.unfinished), forgotten, time.time())]
