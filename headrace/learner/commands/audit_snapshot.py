"""What an audit reads: the ledger and the streams at one instant, and the newest checkpoint's record of that time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire.ledger import LedgerEntry, parse_ledger_entry
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss, newest_record
from headrace.learner.checkpoints.redis_losses import losses_so_far
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

MAX_ATTEMPTS = 10

_SNAPSHOT = """#!lua flags=no-writes
local streams = {}
for i = 4, #KEYS do
  local ids = {}
  for _, entry in ipairs(redis.call('XRANGE', KEYS[i], '-', '+')) do
    local name = ''
    for j = 1, #entry[2], 2 do if entry[2][j] == 'id' then name = entry[2][j + 1] end end
    ids[#ids + 1] = entry[1]
    ids[#ids + 1] = name
  end
  streams[#streams + 1] = ids
end
local cursor = redis.call('HMGET', KEYS[2], 'epoch', 'place')
return {redis.call('HGETALL', KEYS[1]), cursor, redis.call('HKEYS', KEYS[3]), streams}
"""


@dataclass
class AuditSnapshot:
    """The ledger and the streams at one instant, with the newest checkpoint's record of that time."""

    ledger: dict[str, LedgerEntry]
    """By ticket id."""
    entries: dict[str, list[tuple[str, str]]]
    """By stream: entry ids, each with the ticket id in the entry."""
    record: CheckpointRecord | None
    rows: list[dict[str, Any]]
    """The rows of `metrics.jsonl`, up to the checkpoint."""
    cursor: tuple[int, int] | None
    losses: list[RedisLoss]
    """Losses of Redis, including one that no checkpoint has recorded yet."""


def take_snapshot(client: redis.Redis, keys: Keys, folder: Path) -> AuditSnapshot:
    """Raises `ValueError` if Redis has no such run."""
    names = ("tickets", "eval_tickets", "groups", "eval_groups", "dead_letters")
    for _ in range(MAX_ATTEMPTS):
        record = newest_record(folder / "checkpoints")
        others = (keys.ledger, keys.cursor, keys.versions)
        reply: Any = client.eval(_SNAPSHOT, 8, *others, *(getattr(keys, name) for name in names))
        if record == newest_record(folder / "checkpoints"):
            break
    else:
        raise ValueError(f"{folder}: checkpoints are written faster than they can be read")
    flat, cursor, versions, streams = reply
    if not client.exists(keys.epoch):
        raise ValueError(f"Redis has no run {folder.name!r}: expected {keys.epoch}")
    return AuditSnapshot(
        ledger={
            name.decode(errors="replace"): parse_ledger_entry(entry)
            for name, entry in zip(flat[::2], flat[1::2], strict=True)
        },
        entries={
            stream: [(e.decode(), t.decode(errors="replace")) for e, t in zip(ids[::2], ids[1::2], strict=True)]
            for stream, ids in zip(names, streams, strict=True)
        },
        record=record,
        rows=[row for row in read_rows(folder / METRICS_FILE) if record is not None and row["step"] <= record.step],
        cursor=None if cursor[0] is None else (int(cursor[0]), int(cursor[1])),
        losses=losses_so_far(record, [int(version) for version in versions]) if record else [],
    )
