"""Identifies the data that a run's cursor is a position in: with other data, a resumed run would reuse ticket ids.

The fingerprint is stored beside the cursor in Redis and in every checkpoint, and compared when a run is resumed. Other
data are refused, with the differences, or begin explicitly as a new epoch (`headrace up --new-epoch`).
"""

import hashlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.common.config import RunConfig
from headrace.common.models.chat_template import to_builtin_types
from headrace.common.tasks import BadRow, Prompt, Split, Task

MAX_ROWS = 100_000
BUDGET_S = 0.25
"""Prompts are hashed for this long, because a task may compute them, but at least `MIN_ROWS` of them. The next start
hashes as many."""
MIN_ROWS = 256
MAX_VALUE_CHARS = 60


class SplitDigest(msgspec.Struct, frozen=True):
    """A hash of the first `count` prompts of a split in epoch 0."""

    count: int
    is_all: bool
    """An epoch has no more prompts than these."""
    sha256: str


class Fingerprint(msgspec.Struct, frozen=True):
    configured: dict[str, Any]
    """The settings that prompts depend on, by name; values are JSON types."""
    chat_template: str
    """The template's SHA-256."""
    train: SplitDigest
    held_out: SplitDigest
    first_epoch: int = 0
    """The first epoch of these data; tickets of earlier epochs cannot be rebuilt."""


def fingerprint_of(config: RunConfig, task: Task, chat_template: str, like: Fingerprint | None = None) -> Fingerprint:
    """`like`: an earlier fingerprint; as many prompts are hashed as it has."""
    configured = {
        "task.name": config.task.name,
        "task.settings": config.task.settings,
        "task.system_prompt": config.task.system_prompt,
        "model.chat_template_settings": config.model.chat_template_settings,
        "seed": config.seed,
    }

    def rows(split: Split, before: SplitDigest | None) -> SplitDigest:
        return _rows_of(task.prompts(split, seed=config.seed, epoch=0), None if before is None else before.count)

    return Fingerprint(
        configured=msgspec.json.decode(msgspec.json.encode(configured, enc_hook=str)),
        chat_template=hashlib.sha256(chat_template.encode()).hexdigest(),
        train=rows("train", like.train if like else None),
        held_out=rows("held_out", like.held_out if like else None),
    )


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """The differences as texts for people. `new` comes from `fingerprint_of(..., like=old)`."""
    found = []
    for name in sorted(old.configured.keys() | new.configured.keys()):
        before, now = old.configured.get(name), new.configured.get(name)
        if before != now:
            found.append(f"{name} was {_short(before)} and is {_short(now)}")
    if old.chat_template != new.chat_template:
        found.append("the model's chat template has changed")
    for split, before_rows, now_rows in (("train", old.train, new.train), ("held-out", old.held_out, new.held_out)):
        if before_rows.count != now_rows.count or before_rows.is_all != now_rows.is_all:
            found.append(f"{_how_many(before_rows)} {split} prompts were there and {_how_many(now_rows)} are")
        elif before_rows.sha256 != now_rows.sha256:
            found.append(f"the {split} prompts have changed")
    return found


def _rows_of(prompts: Iterator[Prompt | BadRow], count: int | None) -> SplitDigest:
    digest, number = hashlib.sha256(), 0
    deadline = time.monotonic() + BUDGET_S
    for prompt in itertools.islice(prompts, MAX_ROWS if count is None else count):
        digest.update(_bytes_of(prompt))
        number += 1
        if count is None and number >= MIN_ROWS and time.monotonic() > deadline:
            break
    return SplitDigest(number, is_all=next(prompts, None) is None, sha256=digest.hexdigest())


def _bytes_of(prompt: object) -> bytes:
    """A prompt that cannot be encoded cannot become a ticket either; its `repr` is hashed."""
    try:
        return msgspec.msgpack.encode(prompt, enc_hook=_encodable, order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return repr(prompt).encode("utf-8", "backslashreplace")


def _encodable(value: Any) -> Any:
    """NumPy scalars as numbers; other objects as their type, because their `repr` may contain an address."""
    made = to_builtin_types(value)
    return type(value).__name__ if made is value else made


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def _how_many(rows: SplitDigest) -> str:
    return f"{rows.count}" if rows.is_all else f"more than {rows.count}"
