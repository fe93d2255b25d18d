"""Checks that a run resumes with the data that it began with; other data may only begin a new data epoch."""

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
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor

_log = logging.getLogger(__name__)


def stored_fingerprint(client: redis.Redis, keys: Keys, checkpoints: Path) -> Fingerprint | None:
    """The fingerprint of the run's data, from Redis or the newest checkpoint; None for a new run, and for runs of
    releases without fingerprints."""
    written: Any = client.hget(keys.cursor, "data")
    if written is not None:
        return msgspec.json.decode(written, type=Fingerprint)
    record = newest_record(checkpoints)
    return None if record is None else record.data


def resolve_fingerprint(
    config: RunConfig, task: Task, tokenizer: Any, known: Fingerprint | None, is_new_epoch: bool
) -> Fingerprint:
    """The fingerprint of the data that the run continues with: `known`, or with `is_new_epoch` that of other data.
    Raises `ValueError` with the differences if the data are others and `is_new_epoch` is false."""
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
            f"the run began with other data: {'; '.join(changed)}. Expected the same data, or `headrace up "
            "--new-epoch`, which begins the next epoch with the new data"
        )
    _log.warning("the next epoch begins with other data: %s", "; ".join(changed))
    return fingerprint_of(config, task, template)


def store_fingerprint(
    store: LearnerStore, cursor: Cursor, known: Fingerprint | None, found: Fingerprint
) -> tuple[Cursor, Fingerprint]:
    """Writes the fingerprint `found` to Redis, with the cursor, before any ticket is issued. If the data changed, the
    cursor moves to the next data epoch. Returns cursor and fingerprint."""
    if known is not None and found != known:
        cursor = Cursor(cursor.data_epoch + 1, 0)
        found = msgspec.structs.replace(found, first_epoch=cursor.data_epoch)
    store.set_data_fingerprint(msgspec.json.encode(found), cursor)
    return cursor, found
