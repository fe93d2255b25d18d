"""`headrace audit`: reads Redis and the checkpoints of a run and says in which state every ticket is.

    python -m headrace.learner.commands.audit --run demo [--json]

Every ticket must be in exactly one state, and what stands in the streams must be what the ledger points to. A
finished ticket's state is the ledger's, or that of the newest checkpoint while its group still waits in Redis.
Reads only; safe while the run is going on. Exit code 1 if anything is violated.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import redis

from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import DecidedState, TicketState
from headrace.common.wire.ledger import LedgerEntry, parse_ledger_entry, parse_ticket_id
from headrace.learner.checkpoints.record import CheckpointRecord, RedisLoss, newest_record
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

STATES: tuple[TicketState, ...] = get_args(TicketState)
FINISHED = get_args(DecidedState)
HOMES: dict[str, tuple[str, ...]] = {
    "open": ("tickets", "eval_tickets"),
    "answered": ("groups", "eval_groups"),
    "dead": ("dead_letters",),
}
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
class Snapshot:
    """The ledger and the streams at one instant, with the newest checkpoint's record of that time."""

    marks: dict[str, LedgerEntry]
    entries: dict[str, list[tuple[str, str]]]
    """By stream: entry ids with the ticket they name."""
    record: CheckpointRecord | None
    rows: list[dict[str, Any]]
    """Of `metrics.jsonl`, up to the checkpoint."""
    cursor: tuple[int, int] | None
    losses: list[RedisLoss]
    """Of Redis, the one included that no checkpoint has recorded yet."""


@dataclass
class Audit:
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, str]] = field(default_factory=list)
    """Ticket id and what is wrong."""
    notes: list[str] = field(default_factory=list)


def audit(client: redis.Redis, keys: Keys, folder: Path) -> Audit:
    """Raises `ValueError` if Redis has no such run."""
    snapshot = take_snapshot(client, keys, folder)
    found = Audit()
    recorded = _recorded(snapshot.record, found)
    states = {name: recorded.get(name, mark.state) for name, mark in snapshot.marks.items()}
    found.counts.update(states.values())
    _check_entries(snapshot, recorded, found)
    _check_numbers(snapshot, found)
    _check_training(snapshot, states, found)
    return found


def take_snapshot(client: redis.Redis, keys: Keys, folder: Path) -> Snapshot:
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
    return Snapshot(
        marks={
            name.decode(errors="replace"): parse_ledger_entry(mark)
            for name, mark in zip(flat[::2], flat[1::2], strict=True)
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


def losses_so_far(record: CheckpointRecord, versions: Collection[int]) -> list[RedisLoss]:
    """Those that the newest checkpoint tells of, and one more if Redis, which has `versions`, knows none of its: what
    the ledger has marks of from then on is what this checkpoint and the one before recorded."""
    if not record.version_steps or not record.version_steps.keys().isdisjoint(versions):
        return list(record.losses)
    known = Counter[str](one.state for one in (*record.earlier, *record.settlements))
    forgotten = {state: record.counts.get(state, 0) - known[state] for state in FINISHED}
    return [*record.losses, RedisLoss(record.step, len(record.unfinished), forgotten, time.time())]


def _recorded(record: CheckpointRecord | None, found: Audit) -> dict[str, TicketState]:
    """What the checkpoint says and the ledger will, once it is settled."""
    states: dict[str, TicketState] = {}
    for one in (*record.earlier, *record.settlements) if record else ():
        if one.ticket_id in states:
            found.violations.append((one.ticket_id, f"recorded as {states[one.ticket_id]} and again as {one.state}"))
        states[one.ticket_id] = one.state
    return states


def _check_entries(snapshot: Snapshot, recorded: dict[str, TicketState], found: Audit) -> None:
    """The ledger points to exactly what stands in the streams."""
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for stream, entries in snapshot.entries.items():
        for entry_id, name in entries:
            places[name].append((stream, entry_id))
    for name, mark in snapshot.marks.items():
        homes = HOMES.get(mark.state, ())
        at_home = [entry_id for stream, entry_id in places.get(name, []) if stream in homes]
        strays = [
            stream
            for stream, entry_id in places.get(name, [])
            if stream != "dead_letters" and entry_id != mark.entry_id
        ]
        if mark.entry_id and mark.entry_id not in at_home:
            found.violations.append(
                (name, f"lost: the ledger says {mark}, and no such entry is in {' or '.join(homes)}")
            )
        if strays:
            found.violations.append((name, f"the ledger says {mark}, and it is in {' and '.join(strays)} as well"))
        state = recorded.get(name)
        if state is not None and mark.state not in ("answered", state):
            found.violations.append((name, f"recorded as {state} by the checkpoint, and the ledger says {mark}"))
    pointed = {mark.entry_id for mark in snapshot.marks.values() if mark.entry_id}
    for stream, entries in snapshot.entries.items():
        foreign = [
            e for e, name in entries if e not in pointed and (stream == "dead_letters" or name not in snapshot.marks)
        ]
        if foreign:
            found.notes.append(f"{len(foreign)} entries of {stream} are no ticket of this run (first: {foreign[0]})")
    num_purged = sum(mark == LedgerEntry("dead") for mark in snapshot.marks.values())
    if num_purged:
        found.notes.append(f"{num_purged} dead tickets were purged")


def _check_numbers(snapshot: Snapshot, found: Audit) -> None:
    """Every number below the data's cursor has its mark, but for those before a loss of Redis."""
    for loss in snapshot.losses:
        known = ", ".join(f"{count} {state}" for state, count in loss.forgotten.items() if count)
        found.notes.append(
            f"Redis lost everything once: the run went on from step {loss.step}, {loss.num_reissued} tickets were "
            f"issued anew, and of the finished ones only their number is known ({known or 'none'})"
        )
    places: dict[int, set[int]] = defaultdict(set)
    for name in snapshot.marks:
        try:
            kind, epoch, place, _ = parse_ticket_id(name)
        except ValueError as error:
            found.violations.append((name, str(error)))
            continue
        if kind == "train":
            places[epoch].add(place)
    if snapshot.losses or snapshot.cursor is None:
        return
    for epoch in range(snapshot.cursor[0] + 1):
        seen = places[epoch]
        end = snapshot.cursor[1] if epoch == snapshot.cursor[0] else max(seen, default=-1) + 1
        for place in sorted(set(range(end)) - seen):
            found.violations.append((f"{epoch}-{place}", "lost: the cursor is beyond it, and the ledger never saw it"))


def _check_training(snapshot: Snapshot, states: dict[str, TicketState], found: Audit) -> None:
    """What the steps say they trained is what the tickets say, each once."""
    record = snapshot.record
    if record is None:
        return
    trained_in: dict[str, list[int]] = defaultdict(list)
    for row in snapshot.rows:
        for name in row.get("tickets", []):
            trained_in[name].append(row["step"])
    for name, steps in trained_in.items():
        if len(steps) > 1:
            found.violations.append((name, f"trained twice: in steps {', '.join(map(str, steps))}"))
        if states.get(name, "trained") != "trained":
            found.violations.append((name, f"trained in step {steps[0]}, and its state is {states[name]}"))
    for name, state in states.items():
        if state == "trained" and trained_in and name not in trained_in:
            found.violations.append((name, "its state is trained, and no step of this run trained it"))
    forgotten = snapshot.losses[-1].forgotten if snapshot.losses else {}
    for finished in FINISHED:
        expected = record.counts.get(finished, 0) - forgotten.get(finished, 0)
        if found.counts[finished] != expected:
            found.violations.append(
                ("-", f"{found.counts[finished]} tickets are {finished}, the checkpoint counts {expected}")
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.learner.commands.audit")
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.redis_url:
        parser.error("expected --redis-url or HEADRACE_REDIS_URL")
    try:
        found = audit(connect(arguments.redis_url), Keys(arguments.run), arguments.runs_folder / arguments.run)
    except (ValueError, redis.RedisError) as error:
        print(f"headrace audit: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        violations = [{"ticket": name, "violation": text} for name, text in found.violations]
        print(json.dumps({"counts": dict(found.counts), "violations": violations, "notes": found.notes}, indent=2))
    else:
        _print(found, arguments.run)
    return 1 if found.violations else 0


def _print(found: Audit, run: str) -> None:
    print(f"run {run}: {found.counts.total()} tickets")
    for state in STATES:
        print(f"  {state:10} {found.counts[state]}")
    for note in found.notes:
        print(f"note: {note}")
    for name, text in found.violations:
        print(f"VIOLATION {name}: {text}")
    print(f"{len(found.violations)} violations")


if __name__ == "__main__":
    sys.exit(main())
