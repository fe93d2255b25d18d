"""Puts a learner together: fresh, or as its newest checkpoint left it.

Order matters: the epoch fences an earlier learner before the checkpoint is read, and what the checkpoint recorded
is settled before any group is taken in.
"""

from pathlib import Path
from typing import Any

import redis
import torch

from common.config import RunConfig
from common.keys import Keys
from common.preflight import check_vocabulary
from common.tasks import Task
from services.learner.api import Switches
from services.learner.checkpoint import load_newest
from services.learner.intake import Intake
from services.learner.loop import Loop, Progress
from services.learner.policy import Policy, load_tokenizer
from services.learner.prompts import TicketSource, stop_token_ids
from services.learner.report import METRICS_FILE, MetricsFile
from services.learner.store import Cursor, LearnerStore
from services.learner.trainer import Trainer
from services.learner.versions import Versions


def assemble(
    config: RunConfig,
    folder: Path,
    token: str,
    client: redis.Redis,
    keys: Keys,
    url: str,
    task: Task,
    switches: Switches,
) -> tuple[Loop, Any]:
    """The loop, ready to run, and the tokenizer. Raises `ValueError` if the model cannot be used."""
    if config.learner.num_threads is not None:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model.path)
    policy = Policy(config.model, config.learner)
    check_vocabulary(config.model.path, len(tokenizer), policy.model.get_input_embeddings().num_embeddings)
    trainer = Trainer(config, policy)
    store = LearnerStore(client, keys)
    checkpoint = load_newest(folder / "checkpoints")
    record = None
    if checkpoint is not None:
        record, tensors = checkpoint
        trainer.optimizer.load_state_tensors(tensors)

    versions = Versions(folder / "weights", store, url, token, config.learner.keep_versions)
    versions.steps |= record.version_steps if record else {}
    cursor = store.cursor() or (record.cursor if record else Cursor(0, 0))
    stops = stop_token_ids(tokenizer, policy.model.generation_config)
    source = TicketSource(config, task, tokenizer, stops, cursor)
    intake = Intake(config, store, source, versions.steps, recorded=record.settlements if record else [])
    intake.counts.update(record.counts if record else {})
    progress = Progress(step=record.step if record else 0, wall_s_before=record.wall_s if record else 0.0)
    metrics = MetricsFile(folder / METRICS_FILE, progress.step)
    return Loop(
        config, folder / "checkpoints", store, trainer, intake, versions, switches, metrics, progress
    ), tokenizer
