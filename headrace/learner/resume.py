"""Resumes a run from its newest checkpoint, and makes Redis agree with it."""

import contextlib
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec
import redis

from headrace.common.config import RunConfig
from headrace.common.process.atomic_files import fsync_path
from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import SETTINGS, Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.checkpoints.checkpoint import aside_name, find_newest
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss, checkpoint_folders
from headrace.learner.checkpoints.redis_losses import losses_so_far
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.intake import Intake
from headrace.learner.steering.live_config import LiveConfig, resume_config
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.trainer import Trainer
from headrace.learner.weights.publisher import epoch_folder

_log = logging.getLogger(__name__)


def open_store(client: redis.Redis, keys: Keys, folder: Path) -> LearnerStore:
    """Takes a fencing epoch that no other learner has or had, also if Redis has lost epochs: the epoch's folder of
    weights, which only one learner can create, is created before anything uses the epoch."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    while True:
        store = LearnerStore(client, keys, above=_highest_epoch(folder))
        with contextlib.suppress(FileExistsError):  # of a learner that took the same epoch before Redis lost it
            epoch_folder(weights, store.epoch).mkdir()
            fsync_path(weights)
            return store


def _highest_epoch(folder: Path) -> int:
    """The highest fencing epoch in the run's folder: a Redis that was lost counts from 1 again."""
    names = [path.name for path in (*folder.glob("weights/epoch-*"), *checkpoint_folders(folder / "checkpoints"))]
    return max((int(name.split("-")[1]) for name in names), default=0)


def load_newest(trainer: Trainer, checkpoints: Path, epoch: int) -> CheckpointRecord | None:
    """Loads the newest readable checkpoint into the trainer of the learner of `epoch`; None if there is none. Raises
    `ValueError` if every checkpoint is unreadable."""
    _discard_unfinished(checkpoints, epoch)
    found = find_newest(checkpoints)
    if found is None:
        return None
    record, folder = found
    trainer.load_state(folder, sorted(record.files))
    return record


def resume_settings(config: RunConfig, store: LearnerStore, record: CheckpointRecord | None) -> LiveConfig:
    """Writes the settings that apply to Redis, if they differ from those there."""
    in_redis = store.desired_state().settings
    recorded = (record.settings, record.guard) if record else (Settings(), GuardState())
    live_config, settings = resume_config(config, in_redis, *recorded)
    if settings != in_redis:
        store.write_control([("HSET", SETTINGS, msgspec.json.encode(settings))])
    return live_config


def resume_progress(
    store: LearnerStore, intake: Intake, record: CheckpointRecord, versions_in_redis: Collection[int]
) -> Progress:
    """Repairs Redis, and reports that it was lost if that is so."""
    intake.settlement_log.counts.update(record.counts)
    losses = losses_so_far(record, versions_in_redis)
    progress = Progress(step=record.step, wall_s_before=record.wall_s, losses=losses)
    _repair(store, intake.source, record)
    if len(losses) > len(record.losses):
        _report_loss(store, losses[-1])
    return progress


def _discard_unfinished(checkpoints: Path, epoch: int) -> None:
    """Renames the checkpoints that learners before `epoch` are still writing, so that they cannot publish them after
    this. A later learner's are left alone: this learner may have been overtaken already."""
    for aside in checkpoints.glob("aside-*"):
        if aside.name >= aside_name(epoch):
            continue
        with contextlib.suppress(OSError):  # it was published just now
            shutil.rmtree(aside.rename(checkpoints / f"overtaken-{aside.name}"))


def _repair(store: LearnerStore, source: GroupSource, record: CheckpointRecord) -> None:
    """Makes Redis agree with the checkpoint. Safe to repeat."""
    store.settle(record.earlier)
    store.settle(record.settlements, groups="keep")
    entries = store.ledger_entries(record.unfinished)
    source.issue_again([name for name, entry in zip(record.unfinished, entries, strict=True) if entry is None])


def _report_loss(store: LearnerStore, loss: RedisLoss) -> None:
    _log.error(
        "Redis has lost the run: going on from the checkpoint of step %d; %d tickets are issued anew; "
        "%d finished ones are known only by their number",
        loss.step,
        loss.num_reissued,
        sum(loss.forgotten.values()),
    )
    store.run_log.add_event("redis_lost", {"step": loss.step, "num_reissued": loss.num_reissued})
