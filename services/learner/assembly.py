"""Puts a learner together: fresh, or as its newest checkpoint left it.

Order matters: the epoch fences an earlier learner before the checkpoint is read; what the checkpoint knows and
Redis does not is repaired, and what the checkpoint before it recorded is settled, before any group is taken in.
"""

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis
import torch

from common.config import RunConfig
from common.keys import Keys
from common.preflight import check_vocabulary
from common.tasks import Task
from common.waiting import Waits
from services.learner.api import Switches
from services.learner.checkpoint import load_newest
from services.learner.checkpoint_record import Loss, Record
from services.learner.intake import Intake
from services.learner.loop import Loop, Progress
from services.learner.policy import Policy, load_tokenizer
from services.learner.prompts import TicketSource, stop_token_ids
from services.learner.recording import Recording, RecordingSource
from services.learner.refusal import Limits
from services.learner.report import METRICS_FILE, MetricsFile
from services.learner.store import Cursor, LearnerStore
from services.learner.trainer import Trainer
from services.learner.versions import Versions

FINISHED = ("trained", "uniform", "stale", "evaluated")
_log = logging.getLogger(__name__)


def assemble(
    config: RunConfig,
    folder: Path,
    token: str,
    client: redis.Redis,
    keys: Keys,
    url: str,
    task: Task,
    switches: Switches,
    waits: Waits,
    recording: Recording | None = None,
) -> tuple[Loop, Any]:
    """The loop, ready to run, and the tokenizer. Raises `ValueError` if the model or every checkpoint is unusable."""
    if config.learner.num_threads is not None:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model.path)
    policy = Policy(config.model, config.learner)
    vocab_size = policy.model.get_input_embeddings().num_embeddings
    check_vocabulary(config.model.path, len(tokenizer), vocab_size)
    trainer = Trainer(config, policy)
    store = LearnerStore(client, keys)
    record, tensors = load_newest(folder / "checkpoints") or (None, {})
    if record is not None:
        trainer.load_state_tensors(tensors)

    versions = Versions(folder / "weights", store, url, token, config.learner.keep_versions)
    versions.steps |= {
        v: step for v, step in (record.version_steps if record else {}).items() if v not in versions.steps
    }
    is_lost = record is not None and store.exceed_epoch(record.epoch)
    cursor = store.cursor() or (record.cursor if record else Cursor(0, 0))
    if recording is not None:
        source: Any = RecordingSource(recording, cursor)
        version_steps = recording.version_steps
    else:
        source = TicketSource(
            config, task, tokenizer, stop_token_ids(tokenizer, policy.model.generation_config), cursor
        )
        version_steps = versions.steps

    def limits() -> Limits:
        return Limits(
            vocab_size=vocab_size,
            group_size=config.actor.group_size,
            num_eval_samples=config.evaluation.num_samples,
            max_sequence_tokens=getattr(policy.model.config, "max_position_embeddings", 1 << 20),
            highest_version=versions.highest if recording is None else max(recording.version_steps, default=0),
        )

    recorded = record.settlements if record else []
    intake = Intake(config, store, source, version_steps, limits, recorded)
    progress = Progress()
    if record is not None:
        intake.counts.update(record.counts)
        progress = Progress(step=record.step, wall_s_before=record.wall_s, losses=list(record.losses))
        _repair(store, source, record)
        if is_lost:
            progress.losses.append(_tell_loss(store, record))
    metrics = MetricsFile(folder / METRICS_FILE, progress.step)
    loop = Loop(config, folder / "checkpoints", store, trainer, intake, versions, switches, metrics, progress, waits)
    return loop, tokenizer


def _repair(store: LearnerStore, source: Any, record: Record) -> None:
    """Makes Redis agree with the checkpoint, whatever either of them missed. Safe to repeat."""
    store.settle(record.earlier)
    store.settle(record.settlements, groups="keep")
    unknown = [
        name for name, mark in zip(record.unfinished, store.marks(record.unfinished), strict=True) if mark is None
    ]
    source.issue_again(unknown)


def _tell_loss(store: LearnerStore, record: Record) -> Loss:
    """What the ledger has marks of from now on is what this checkpoint and the one before recorded."""
    known = Counter[str](one.state for one in (*record.earlier, *record.settlements))
    forgotten = {state: record.counts.get(state, 0) - known[state] for state in FINISHED}
    loss = Loss(record.step, len(record.unfinished), forgotten, time.time())
    _log.error(
        "Redis has lost the run: going on from the checkpoint of step %d; %d tickets are issued anew; "
        "%d finished ones are known only by their number",
        loss.step,
        loss.num_reissued,
        sum(forgotten.values()),
    )
    store.announce("redis_lost", {"step": loss.step, "num_reissued": loss.num_reissued})
    return loss
