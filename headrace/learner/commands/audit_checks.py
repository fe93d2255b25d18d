"""The checks of an audit. Pure: each compares parts of a snapshot and adds to the report what contradicts."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import get_args

from headrace.common.wire import DecidedState, TicketState
from headrace.common.wire.ledger import LedgerEntry, parse_ticket_id
from headrace.learner.checkpoints.record import CheckpointRecord
from headrace.learner.commands.audit_snapshot import AuditSnapshot

FINISHED = get_args(DecidedState)
STREAMS: dict[str, tuple[str, ...]] = {
    "open": ("tickets", "eval_tickets"),
    "answered": ("groups", "eval_groups"),
    "dead": ("dead_letters",),
}
"""The streams that a ticket of each state may be in."""


@dataclass
class AuditReport:
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a ticket id and what is wrong."""
    notes: list[str] = field(default_factory=list)


def recorded_states(record: CheckpointRecord | None, report: AuditReport) -> dict[str, TicketState]:
    """The states that the checkpoint has recorded; the ledger has them once it is settled."""
    states: dict[str, TicketState] = {}
    for one in (*record.earlier, *record.settlements) if record else ():
        if one.ticket_id in states:
            report.violations.append((one.ticket_id, f"recorded as {states[one.ticket_id]} and again as {one.state}"))
        states[one.ticket_id] = one.state
    return states


def check_streams(snapshot: AuditSnapshot, recorded: dict[str, TicketState], report: AuditReport) -> None:
    """Every entry that the ledger points to is in its stream, and nothing else is."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for stream, entries in snapshot.entries.items():
        for entry_id, name in entries:
            found[name].append((stream, entry_id))
    for name, entry in snapshot.ledger.items():
        streams = STREAMS.get(entry.state, ())
        in_place = [entry_id for stream, entry_id in found.get(name, []) if stream in streams]
        strays = [
            stream
            for stream, entry_id in found.get(name, [])
            if stream != "dead_letters" and entry_id != entry.entry_id
        ]
        if entry.entry_id and entry.entry_id not in in_place:
            report.violations.append(
                (name, f"lost: the ledger says {entry}, and no such entry is in {' or '.join(streams)}")
            )
        if strays:
            report.violations.append((name, f"the ledger says {entry}, and it is in {' and '.join(strays)} as well"))
        state = recorded.get(name)
        if state is not None and entry.state not in ("answered", state):
            report.violations.append((name, f"recorded as {state} by the checkpoint, and the ledger says {entry}"))
    pointed = {entry.entry_id for entry in snapshot.ledger.values() if entry.entry_id}
    for stream, entries in snapshot.entries.items():
        unknown = [
            e for e, name in entries if e not in pointed and (stream == "dead_letters" or name not in snapshot.ledger)
        ]
        if unknown:
            report.notes.append(f"{len(unknown)} entries of {stream} are no ticket of this run (first: {unknown[0]})")
    num_purged = sum(entry == LedgerEntry("dead") for entry in snapshot.ledger.values())
    if num_purged:
        report.notes.append(f"{num_purged} dead tickets were purged")


def check_data(snapshot: AuditSnapshot, report: AuditReport) -> None:
    """Every prompt before the data cursor is in the ledger, unless Redis was lost."""
    for loss in snapshot.losses:
        known = ", ".join(f"{count} {state}" for state, count in loss.forgotten.items() if count)
        report.notes.append(
            f"Redis lost everything once: the run went on from step {loss.step}, {loss.num_reissued} tickets were "
            f"issued anew, and of the finished ones only their number is known ({known or 'none'})"
        )
    positions: dict[int, set[int]] = defaultdict(set)
    for name in snapshot.ledger:
        try:
            kind, epoch, position, _ = parse_ticket_id(name)
        except ValueError as error:
            report.violations.append((name, str(error)))
            continue
        if kind == "train":
            positions[epoch].add(position)
    if snapshot.losses or snapshot.cursor is None:
        return
    for epoch in range(snapshot.cursor[0] + 1):
        seen = positions[epoch]
        end = snapshot.cursor[1] if epoch == snapshot.cursor[0] else max(seen, default=-1) + 1
        for position in sorted(set(range(end)) - seen):
            report.violations.append(
                (f"{epoch}-{position}", "lost: the cursor is beyond it, and the ledger never saw it")
            )


def check_training(snapshot: AuditSnapshot, states: dict[str, TicketState], report: AuditReport) -> None:
    """The tickets that the steps trained are those whose state is trained, each once."""
    record = snapshot.record
    if record is None:
        return
    trained_in: dict[str, list[int]] = defaultdict(list)
    for row in snapshot.rows:
        for name in row.get("tickets", []):
            trained_in[name].append(row["step"])
    for name, steps in trained_in.items():
        if len(steps) > 1:
            report.violations.append((name, f"trained twice: in steps {', '.join(map(str, steps))}"))
        if states.get(name, "trained") != "trained":
            report.violations.append((name, f"trained in step {steps[0]}, and its state is {states[name]}"))
    for name, state in states.items():
        if state == "trained" and trained_in and name not in trained_in:
            report.violations.append((name, "its state is trained, and no step of this run trained it"))
    forgotten = snapshot.losses[-1].forgotten if snapshot.losses else {}
    for finished in FINISHED:
        expected = record.counts.get(finished, 0) - forgotten.get(finished, 0)
        if report.counts[finished] != expected:
            report.violations.append(
                ("-", f"{report.counts[finished]} tickets are {finished}, the checkpoint counts {expected}")
            )
