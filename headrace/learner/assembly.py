"""Puts a learner together: fresh, or as its newest checkpoint left it.

Order matters: the epoch fences an earlier learner before the checkpoint is read; what the checkpoint knows and
Redis does not is repaired, and what the checkpoint before it recorded is settled, before any group is taken in.
"""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec
import redis

from headrace.common.config import RunConfig
from headrace.common.models.chat import Chat, load_tokenizer, stop_token_ids
from headrace.common.models.context_length import context_tokens
from headrace.common.preflight.recipe import check_vocabulary
from headrace.common.process.atomic_files import publish_atomically
from headrace.common.process.waiting import Waits
from headrace.common.redis.keys import Keys
from headrace.common.tasks import Task
from headrace.common.weights.files import MODEL_FILE
from headrace.common.wire.desired_state import SETTINGS, Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.checkpoints.best import CONFIG_FOLDER, UNCHANGED_FOLDER, BestPolicy
from headrace.learner.checkpoints.checkpoint import find_newest
from headrace.learner.checkpoints.data_check import resolve_fingerprint, store_fingerprint, stored_fingerprint
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss, checkpoint_folders
from headrace.learner.checkpoints.redis_losses import losses_so_far
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.recording_source import RecordingSource
from headrace.learner.intake.recordings import Recording
from headrace.learner.intake.samples import TokenTexts
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.intake.validation import GroupLimits
from headrace.learner.loop import Loop
from headrace.learner.model.policy import Policy
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.reporting.summary import METRICS_FILE, MetricsFile
from headrace.learner.reporting.trackers import Trackers
from headrace.learner.scaling.advice import ReplicaAdviser
from headrace.learner.stages.evaluation import Evaluator
from headrace.learner.steering.live_config import resume_config
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from headrace.learner.training.leader import build_trainer, set_up_torch
from headrace.learner.weights.publisher import WeightVersions

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
    ranks: Ranks | None = None,
    is_new_epoch: bool = False,
) -> tuple[Loop, Any]:
    """The loop, ready to run, and the tokenizer. Raises `ValueError` if the model or every checkpoint is unusable, or
    the data are not those that the run began with; `is_new_epoch`: then others begin with its next epoch."""
    ranks = ranks or Ranks()
    ranks.on_lost = switches.stop.set
    set_up_torch(config, ranks)
    tokenizer = load_tokenizer(config.model)
    chat = Chat(tokenizer, config.model, config.task.system_prompt)
    known, data = None, None
    if recording is None:
        known = stored_fingerprint(client, keys, folder / "checkpoints")
        data = resolve_fingerprint(config, task, tokenizer, known, is_new_epoch)
    trainer = build_trainer(config, ranks)
    policy = trainer.policy
    _log.info("the policy is loaded")
    vocab_size = policy.model.get_input_embeddings().num_embeddings
    check_vocabulary(config.model.path, len(tokenizer), vocab_size)
    store = LearnerStore(client, keys, above=_highest_epoch(folder))
    _stop_unfinished(folder / "checkpoints")
    record, saved = find_newest(folder / "checkpoints") or (None, folder)
    if record is not None:
        trainer.load_state(saved, sorted(record.files))
    settings_in_redis = store.desired_state().settings
    recorded = (record.settings, record.guard) if record else (Settings(), GuardState())
    live_config, settings = resume_config(config, settings_in_redis, *recorded)
    config = trainer.config = live_config.config
    if settings != settings_in_redis:
        store.write_control([("HSET", SETTINGS, msgspec.json.encode(settings))])

    versions_in_redis = store.version_steps()
    versions = WeightVersions(folder / "weights", store, url, token)
    versions.steps |= {
        v: step for v, step in (record.version_steps if record else {}).items() if v not in versions.steps
    }
    cursor = store.cursor() or (record.cursor if record else Cursor(0, 0))
    max_sequence_tokens = context_tokens(policy.model.config, config.generation.engine.context_tokens)
    if data is not None:
        cursor, data = store_fingerprint(store, cursor, known, data)
    if recording is not None:
        source: GroupSource = RecordingSource(recording, cursor)
        version_steps = recording.version_steps
    else:
        stops = stop_token_ids(chat, policy.model.generation_config)
        source = TicketSource(config, task, chat, stops, cursor, max_sequence_tokens, data)
        version_steps = versions.steps

    def limits() -> GroupLimits:
        return GroupLimits(
            vocab_size=vocab_size,
            group_size=config.actor.group_size,
            num_eval_samples=config.evaluation.completions_per_prompt,
            max_sequence_tokens=max_sequence_tokens,
            highest_version=versions.highest if recording is None else max(recording.version_steps, default=0),
        )

    settled = record.settlements if record else []
    intake = Intake(config, store, source, version_steps, limits, settled, switches)
    intake.control_state.sync_desired_state()
    progress = Progress()
    if record is not None:
        intake.settlement_log.counts.update(record.counts)
        losses = losses_so_far(record, versions_in_redis)
        progress = Progress(step=record.step, wall_s_before=record.wall_s, losses=losses)
        _repair(store, source, record)
        if len(losses) > len(record.losses):
            _report_loss(store, losses[-1])
    metrics = MetricsFile(folder / METRICS_FILE, progress.step)
    generation = config.generation
    start = store.advised_replicas() or generation.replicas
    adviser = ReplicaAdviser(start, generation.max_replicas, generation.max_groups_in_flight)
    trackers = Trackers(
        config.trackers, folder, live_config.configured.model_dump(exclude={"redis_url"}), progress.step
    )
    _save_model_folders(policy, folder / CONFIG_FOLDER, tokenizer)
    best = BestPolicy(folder, store.epoch, store.check_fence)
    parts = (store, trainer, intake, versions, switches, progress, waits)
    reporter = RunReporter(*parts, adviser, metrics, trackers, TokenTexts(tokenizer), live_config)
    evaluator = Evaluator(intake, versions, best, reporter)
    return Loop(live_config, folder / "checkpoints", *parts, reporter, evaluator), tokenizer


def _save_model_folders(policy: Policy, config_folder: Path, tokenizer: Any) -> None:
    """Saves what `best/` and an export need beside weights, so that they do not need the run's initial model."""
    aside = config_folder.with_name(f"{config_folder.name}-aside")
    shutil.rmtree(aside, ignore_errors=True)
    policy.save_config_and_tokenizer(aside, tokenizer)
    publish_atomically(aside, config_folder)
    aside.mkdir()
    policy.save_unchanged(aside / MODEL_FILE)
    publish_atomically(aside, config_folder.with_name(UNCHANGED_FOLDER))


def _stop_unfinished(checkpoints: Path) -> None:
    """What an overtaken learner is writing can be renamed into place before this or not at all: never behind the
    back of the one that takes up."""
    for aside in checkpoints.glob("aside-*"):
        with contextlib.suppress(OSError):  # it was
            shutil.rmtree(aside.rename(checkpoints / f"overtaken-{aside.name}"))


def _repair(store: LearnerStore, source: GroupSource, record: CheckpointRecord) -> None:
    """Makes Redis agree with the checkpoint, whatever either of them missed. Safe to repeat."""
    store.settle(record.earlier)
    store.settle(record.settlements, groups="keep")
    unknown = [
        name
        for name, mark in zip(record.unfinished, store.ledger_entries(record.unfinished), strict=True)
        if mark is None
    ]
    source.issue_again(unknown)


def _highest_epoch(folder: Path) -> int:
    """Of all learners that have worked in the run's folder; a Redis that was lost counts from 1 again."""
    names = [path.name for path in (*folder.glob("weights/epoch-*"), *checkpoint_folders(folder / "checkpoints"))]
    return max((int(name.split("-")[1]) for name in names), default=0)


def _report_loss(store: LearnerStore, loss: RedisLoss) -> None:
    _log.error(
        "Redis has lost the run: going on from the checkpoint of step %d; %d tickets are issued anew; "
        "%d finished ones are known only by their number",
        loss.step,
        loss.num_reissued,
        sum(loss.forgotten.values()),
    )
    store.run_log.add_event("redis_lost", {"step": loss.step, "num_reissued": loss.num_reissued})
