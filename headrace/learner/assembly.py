"""Assembles a learner: a new one, or one that resumes from its newest checkpoint.

The order matters. The epoch fences an earlier learner before the checkpoint is read. Before any group is taken in, the
groups that the checkpoint before recorded are settled, and what Redis lacks is repaired from the checkpoint.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from headrace.common.models.chat_template import ChatTemplate, stop_token_ids
from headrace.common.models.context_length import context_tokens
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.preflight.recipe import check_vocabulary
from headrace.common.process.atomic_files import publish_atomically
from headrace.common.process.waiting import Waits
from headrace.common.weights.files import MODEL_FILE
from headrace.learner.checkpoints.best import CONFIG_FOLDER, UNCHANGED_FOLDER, BestPolicy
from headrace.learner.checkpoints.data_check import resolve_fingerprint, store_fingerprint, stored_fingerprint
from headrace.learner.checkpoints.progress import Progress
from headrace.learner.context import LearnerContext
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.recording_source import RecordingSource
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.intake.validation import GroupLimits
from headrace.learner.loop import Loop
from headrace.learner.model.policy import Policy
from headrace.learner.reporting.reporter import RunReporter
from headrace.learner.reporting.summary import METRICS_FILE, MetricsFile
from headrace.learner.reporting.token_texts import TokenTexts
from headrace.learner.reporting.trackers import Trackers
from headrace.learner.resume import load_newest, open_store, resume_progress, resume_settings
from headrace.learner.scaling.advice import ReplicaAdviser
from headrace.learner.stages.evaluation import Evaluator
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from headrace.learner.training.leader import build_trainer, set_up_torch
from headrace.learner.training.trainer import Trainer
from headrace.learner.weights.publisher import WeightVersions

_log = logging.getLogger(__name__)


def assemble(context: LearnerContext) -> tuple[Loop, Any]:
    """Returns the loop, ready to run, and the tokenizer. Raises `ValueError` if the model or every checkpoint is
    unusable, or the data are not the run's and no new epoch is allowed."""
    config, folder, recording = context.config, context.folder, context.recording
    ranks = context.ranks or Ranks()
    ranks.on_lost = context.switches.stop.set
    set_up_torch(config, ranks)
    tokenizer = load_tokenizer(config.model)
    chat = ChatTemplate(tokenizer, config.model, config.task.system_prompt)
    known, data = None, None
    if recording is None:
        known = stored_fingerprint(context.client, context.keys, folder / "checkpoints")
        data = resolve_fingerprint(config, context.task, tokenizer, known, context.is_new_epoch)
    trainer = build_trainer(config, ranks)
    _log.info("the policy is loaded")
    vocab_size = trainer.policy.model.get_input_embeddings().num_embeddings
    check_vocabulary(config.model.path, len(tokenizer), vocab_size)

    store = open_store(context.client, context.keys, folder)
    record = load_newest(trainer, folder / "checkpoints", store.epoch)
    live_config = resume_settings(config, store, record)
    config = trainer.config = live_config.config
    versions_in_redis = store.version_steps()
    versions = WeightVersions(folder / "weights", store, context.url, context.token)
    if record is not None:
        versions.steps |= {v: step for v, step in record.version_steps.items() if v not in versions.steps}
    cursor = store.cursor() or (record.cursor if record else Cursor(0, 0))
    max_sequence_tokens = context_tokens(trainer.policy.model.config, config.generation.engine.context_tokens)
    if data is not None:
        cursor, data = store_fingerprint(store, cursor, known, data)
    if recording is not None:
        source: GroupSource = RecordingSource(recording, cursor)
        version_steps = recording.version_steps
    else:
        stops = stop_token_ids(chat, trainer.policy.model.generation_config)
        source = TicketSource(config, context.task, chat, stops, cursor, max_sequence_tokens, data)
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
    intake = Intake(config, store, source, version_steps, limits, settled, context.switches)
    intake.control_state.sync_desired_state()
    progress = Progress() if record is None else resume_progress(store, intake, record, versions_in_redis)
    _save_model_folders(trainer.policy, folder / CONFIG_FOLDER, tokenizer)
    parts = (store, trainer, intake, versions, context.switches, progress, context.waits)
    reporter = _make_reporter(folder, parts, live_config, tokenizer)
    evaluator = Evaluator(intake, versions, BestPolicy(folder, store.epoch, store.check_fence), reporter)
    return Loop(live_config, folder / "checkpoints", *parts, reporter, evaluator), tokenizer


Parts = tuple[LearnerStore, Trainer, Intake, WeightVersions, Switches, Progress, Waits]


def _make_reporter(folder: Path, parts: Parts, live_config: LiveConfig, tokenizer: Any) -> RunReporter:
    store, progress, config = parts[0], parts[5], live_config.config
    metrics = MetricsFile(folder / METRICS_FILE, progress.step, store.epoch, store.check_fence)
    start = store.advised_replicas() or config.generation.replicas
    adviser = ReplicaAdviser(start, config.generation.max_replicas, config.generation.max_groups_in_flight)
    configured = live_config.configured.model_dump(exclude={"redis_url"})
    trackers = Trackers(config.trackers, folder, configured, progress.step)
    return RunReporter(*parts, adviser, metrics, trackers, TokenTexts(tokenizer), live_config)


def _save_model_folders(policy: Policy, config_folder: Path, tokenizer: Any) -> None:
    """Saves what `best/` and an export need beside weights, so that they do not need the run's initial model."""
    aside = config_folder.with_name(f"{config_folder.name}-aside")
    shutil.rmtree(aside, ignore_errors=True)
    policy.save_config_and_tokenizer(aside, tokenizer)
    publish_atomically(aside, config_folder)
    aside.mkdir()
    policy.save_unchanged(aside / MODEL_FILE)
    publish_atomically(aside, config_folder.with_name(UNCHANGED_FOLDER))
