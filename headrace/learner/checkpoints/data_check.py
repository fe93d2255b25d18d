"""The data that a run is taken up with are those that it began with, or others from an epoch of their own on."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import redis

from headrace.common.config import RunConfig
from headrace.common.redis.keys import Keys
from headrace.common.tasks import Task
from headrace.learner.checkpoints.record import newest_record
from headrace.learner.intake.data_fingerprint import Fingerprint, differences, fingerprint_of
from headrace.learner.store.store import Cursor, LearnerStore

_log = logging.getLogger(__name__)


def known_data(client: redis.Redis, keys: Keys, checkpoints: Path) -> Fingerprint | None:
    """Of the run so far: Redis's, or the newest checkpoint's; None of a new run, or of one older than fingerprints."""
    written: Any = client.hget(keys.cursor, "data")
    if written is not None:
        return msgspec.json.decode(written, type=Fingerprint)
    record = newest_record(checkpoints)
    return None if record is None else record.data


def data_of(
    config: RunConfig, task: Task, tokenizer: Any, known: Fingerprint | None, is_new_epoch: bool
) -> Fingerprint:
    """What the run is taken up with: `known`, or what may begin a new epoch. Raises `ValueError`, with what differs, if
    it may not."""
    template = tokenizer.get_chat_template()
    if known is None:
        return fingerprint_of(config, task, template)
    changed = differences(known, fingerprint_of(config, task, template, like=known))
    if not changed:
        if is_new_epoch:
            _log.info("the data are those that the run began with: no new epoch")
        return known
    if not is_new_epoch:
        raise ValueError(
            f"the run began with other data: {'; '.join(changed)}. Expected what was, or `headrace up --new-epoch`, "
            "which begins the next epoch with these"
        )
    _log.warning("the next epoch begins with other data: %s", "; ".join(changed))
    return fingerprint_of(config, task, template)


def begin(
    store: LearnerStore, cursor: Cursor, known: Fingerprint | None, found: Fingerprint
) -> tuple[Cursor, Fingerprint]:
    """Where the run goes on, and in what; written beside the cursor, before anything is issued."""
    if known is not None and found != known:
        cursor = Cursor(cursor.data_epoch + 1, 0)
        found = msgspec.structs.replace(found, first_epoch=cursor.data_epoch)
    store.set_data_fingerprint(msgspec.json.encode(found), cursor)
    return cursor, found
