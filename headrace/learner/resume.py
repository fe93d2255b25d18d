"""Resumes a run from its newest checkpoint, and makes Redis agree with it."""

import contextlib
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec

from headrace.common.config import RunConfig
from headrace.common.wire.desired_state import SETTINGS, Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.checkpoints.checkpoint import find_newest
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss, checkpoint_folders
from headrace.learner.checkpoints.redis_losses import losses_so_far
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.intake import Intake
from headrace.learner.steering.live_config import LiveConfig, resume_config
from headrace.learner.store.store import LearnerStore
from headrace.learner.training.trainer import Trainer

_log = logging.getLogger(__name__)


def highest_epoch(folder: Path) -> int:
    """The highest fencing epoch in the run's folder: a Redis that was lost counts from 1 again."""
    names = [path.name for path in (*folder.glob("weights/epoch-*"), *checkpoint_folders(folder / "checkpoints"))]
    return max((int(name.split("-")[1]) for name in names), default=0)


def load_newest(trainer: Trainer, checkpoints: Path) -> CheckpointRecord | None:
    """Loads the newest readable checkpoint into the trainer; None if there is none. Raises `ValueError` if every
    checkpoint is unreadable."""
    _discard_unfinished(checkpoints)
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


def _discard_unfinished(checkpoints: Path) -> None:
    """Renames the checkpoints that a fenced learner is still writing, so that it cannot publish them after this."""
    for aside in checkpoints.glob("aside-*"):
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
