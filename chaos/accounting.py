"""Accounts for every ticket: by `headrace audit`, and again without it, from the raw files and keys.

The second count shares no code with the product. It checks that steps 1 to the last appear once each with the right
number of tickets, that no ticket is in two of them, that versions grow, that the ledger has as many trained tickets as
the steps trained, and that no prompt below the data cursor is missing.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import redis

AUDIT_TIMEOUT_S = 120.0
LOST, TWICE = "lost", "trained twice"
STUCK_AFTER_STEPS = 6
"""A group that has waited for more steps than this is stuck: a working learner would have dropped it as stale
before."""


class Violation(NamedTuple):
    ticket: str
    text: str
    """Begins with `LOST` or `TWICE` for these two kinds."""


class Evidence(NamedTuple):
    """What a finished run leaves behind."""

    rows: Sequence[Mapping[str, Any]]
    """The rows of `metrics.jsonl`."""
    ledger: Mapping[str, str]
    """Ticket -> ledger entry, such as `open 17-0`."""
    recorded: Mapping[str, str]
    """Ticket -> state in the newest checkpoint."""
    entries: Mapping[str, str]
    """Ticket -> id of its entry in the streams."""
    cursor: tuple[int, int]
    """Epoch and place of the next prompt."""


def run_audit(run: str, runs_folder: Path, redis_url: str) -> list[Violation]:
    """Works on a live run, too. Raises `RuntimeError` if the audit fails."""
    command = [
        sys.executable,
        "-m",
        "headrace.launcher",
        "audit",
        "--run",
        run,
        "--json",
        "--runs-folder",
        str(runs_folder),
    ]
    done = subprocess.run([*command, "--redis-url", redis_url], capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"headrace audit ended with {done.returncode}: {done.stderr.strip()}")
    return [Violation(found["ticket"], found["violation"]) for found in json.loads(done.stdout)["violations"]]


def gather(client: redis.Redis, prefix: str, folder: Path) -> Evidence:
    """`prefix`: of the run's keys."""
    ledger = {name.decode(): mark.decode() for name, mark in client.hgetall(f"{prefix}ledger").items()}
    found: dict[str, str] = {}
    for stream in ("tickets", "eval_tickets", "groups", "eval_groups", "dead_letters"):
        rows: Any = client.xrange(f"{prefix}{stream}")
        found |= {fields.get(b"id", b"?").decode(): entry_id.decode() for entry_id, fields in rows}
    epoch, place = client.hmget(f"{prefix}cursor", "epoch", "place")
    record = _newest_record(folder)
    return Evidence(
        rows=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        ledger=ledger,
        recorded={name: state for *_, name, state in (*record["earlier"], *record["settlements"])},
        entries=found,
        cursor=(int(epoch or 0), int(place or 0)),
    )


def check(evidence: Evidence, num_steps: int, groups_per_step: int) -> list[Violation]:
    steps = [row for row in evidence.rows if row["kind"] == "step"]
    states = {name: mark.partition(" ")[0] for name, mark in evidence.ledger.items()} | dict(evidence.recorded)
    return [
        *_check_steps(steps, num_steps, groups_per_step),
        *_check_trained(steps, states, num_steps * groups_per_step),
        *_check_nothing_lost(evidence),
    ]


def dead_tickets(client: redis.Redis, prefix: str) -> dict[str, str]:
    """Ticket -> reason."""
    rows: Any = client.xrange(f"{prefix}dead")
    return {
        fields.get(b"id", b"?").decode(errors="replace"): fields.get(b"reason", b"").decode(errors="replace")
        for _, fields in rows
    }


def stuck_groups(client: redis.Redis, prefix: str, folder: Path, ended_s: Mapping[int, float]) -> list[Violation]:
    """Groups that a working learner neither trains nor discards: they are lost until it is restarted.

    `ended_s`: when each step was completed.
    """
    record = _newest_record(folder)
    if record is None or record["step"] - STUCK_AFTER_STEPS not in ended_s:
        return []
    limit_s = ended_s[record["step"] - STUCK_AFTER_STEPS]
    recorded = {entry_id for _, entry_id, *_ in (*record["earlier"], *record["settlements"])}
    rows: Any = client.xrange(f"{prefix}groups", max=int(limit_s * 1000))
    return [
        Violation(
            fields.get(b"id", b"?").decode(),
            f"stuck: committed before step {record['step'] - STUCK_AFTER_STEPS}, and the learner, at step "
            f"{record['step']}, has done nothing with it",
        )
        for entry_id, fields in rows
        if entry_id.decode() not in recorded
    ]


def _newest_record(folder: Path) -> Any:
    """The record of the newest checkpoint; None if there is none, or it is being deleted."""
    for path in sorted(folder.glob("checkpoints/checkpoint-*/record.json"), reverse=True):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())["record"]
    return None


def _check_steps(steps: Sequence[Mapping[str, Any]], num_steps: int, groups_per_step: int) -> list[Violation]:
    found = []
    numbers = [row["step"] for row in steps]
    if numbers != list(range(1, num_steps + 1)):
        found.append(Violation("-", f"expected the steps 1 to {num_steps} once each, in order, found {numbers}"))
    versions = [row["weight_version"] for row in steps]
    if versions != sorted(set(versions)):
        found.append(Violation("-", f"versions do not grow: {versions}"))
    for row in steps:
        if len(row["tickets"]) != groups_per_step:
            found.append(Violation("-", f"step {row['step']} has {len(row['tickets'])} tickets"))
    return found


def _check_trained(steps: Sequence[Mapping[str, Any]], states: Mapping[str, str], num_expected: int) -> list[Violation]:
    times = Counter(name for row in steps for name in row["tickets"])
    trained = {name for name, state in states.items() if state == "trained"}
    found = [Violation(name, f"{TWICE}: by {count} steps") for name, count in times.items() if count > 1]
    found += [Violation(name, f"trained by a step, and is {states.get(name)}") for name in times.keys() - trained]
    found += [Violation(name, "is trained, and no step has it") for name in trained - times.keys()]
    if len(trained) != num_expected:
        found.append(Violation("-", f"{len(trained)} tickets are trained, expected {num_expected}"))
    return found


def _check_nothing_lost(evidence: Evidence) -> list[Violation]:
    found = []
    for name, mark in evidence.ledger.items():
        _, _, entry_id = mark.partition(" ")
        if entry_id and evidence.entries.get(name) != entry_id:
            found.append(Violation(name, f"{LOST}: it is {mark}, and the streams have {evidence.entries.get(name)}"))
    epoch, place = evidence.cursor
    below = (f"{epoch}-{number}" for number in range(place))
    found += [
        Violation(name, f"{LOST}: below the cursor, and not in the ledger")
        for name in below
        if name not in evidence.ledger
    ]
    return found
