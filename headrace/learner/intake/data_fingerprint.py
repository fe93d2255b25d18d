"""Which data a run's cursor is a place of: a run that is taken up with other prompts would issue them under old ids.

Written beside the cursor in Redis and into every checkpoint. What a run is taken up with is held against it; other data
are refused, with what differs, or begun explicitly as a new epoch (`headrace up --new-epoch`).
"""

import hashlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.common.config import RunConfig
from headrace.common.models.chat import to_builtin_types
from headrace.common.tasks import BadRow, Prompt, Split, Task

MAX_ROWS = 100_000
BUDGET_S = 0.25
"""A task may compute its prompts: so long, and `MIN_ROWS` at least, are they hashed. The next start hashes as many."""
MIN_ROWS = 256
MAX_SHOWN_CHARS = 60


class Rows(msgspec.Struct, frozen=True):
    """The first `count` prompts of a split in epoch 0."""

    count: int
    is_all: bool
    """There are no more in an epoch."""
    sha256: str


class Fingerprint(msgspec.Struct, frozen=True):
    configured: dict[str, Any]
    """What prompts are made by, under the names of the settings; values that JSON has."""
    chat_template: str
    """Its SHA-256."""
    train: Rows
    held_out: Rows
    first_epoch: int = 0
    """Of these data; what was before cannot be made again."""


def fingerprint_of(config: RunConfig, task: Task, chat_template: str, like: Fingerprint | None = None) -> Fingerprint:
    """`like`: as many rows are hashed as there were then."""
    configured = {
        "task.name": config.task.name,
        "task.settings": config.task.settings,
        "task.system_prompt": config.task.system_prompt,
        "model.chat_template_settings": config.model.chat_template_settings,
        "seed": config.seed,
    }

    def rows(split: Split, before: Rows | None) -> Rows:
        return _rows_of(task.prompts(split, seed=config.seed, epoch=0), None if before is None else before.count)

    return Fingerprint(
        configured=msgspec.json.decode(msgspec.json.encode(configured, enc_hook=str)),
        chat_template=hashlib.sha256(chat_template.encode()).hexdigest(),
        train=rows("train", like.train if like else None),
        held_out=rows("held_out", like.held_out if like else None),
    )


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What differs, for people; empty if nothing does. `new` is of `fingerprint_of(..., like=old)`."""
    found = []
    for name in sorted(old.configured.keys() | new.configured.keys()):
        before, now = old.configured.get(name), new.configured.get(name)
        if before != now:
            found.append(f"{name} was {_shown(before)} and is {_shown(now)}")
    if old.chat_template != new.chat_template:
        found.append("the model's chat template is another")
    for split, before_rows, now_rows in (("train", old.train, new.train), ("held-out", old.held_out, new.held_out)):
        if before_rows.count != now_rows.count or before_rows.is_all != now_rows.is_all:
            found.append(f"{_how_many(before_rows)} {split} prompts were there and {_how_many(now_rows)} are")
        elif before_rows.sha256 != now_rows.sha256:
            found.append(f"the {split} prompts are others")
    return found


def _rows_of(prompts: Iterator[Prompt | BadRow], count: int | None) -> Rows:
    digest, number = hashlib.sha256(), 0
    deadline = time.monotonic() + BUDGET_S
    for prompt in itertools.islice(prompts, MAX_ROWS if count is None else count):
        digest.update(_bytes_of(prompt))
        number += 1
        if count is None and number >= MIN_ROWS and time.monotonic() > deadline:
            break
    return Rows(number, is_all=next(prompts, None) is None, sha256=digest.hexdigest())


def _bytes_of(prompt: object) -> bytes:
    """What cannot be encoded cannot become a ticket either: its text will do."""
    try:
        return msgspec.msgpack.encode(prompt, enc_hook=_as_it_is, order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return repr(prompt).encode("utf-8", "backslashreplace")


def _as_it_is(value: Any) -> Any:
    """Numpy's scalars as numbers; of anything else the type, for an object's text may name its address."""
    made = to_builtin_types(value)
    return type(value).__name__ if made is value else made


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _how_many(rows: Rows) -> str:
    return f"{rows.count}" if rows.is_all else f"more than {rows.count}"
