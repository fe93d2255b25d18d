"""`headrace audit`: cross-checks ledger, streams, checkpoints and steps of a run, and counts its tickets by state.

    python -m headrace.learner.commands.audit --run demo [--json]

Every ticket must be in exactly one state, and the streams must have exactly the entries that the ledger points to. A
finished ticket's state is the ledger's, or that of the newest checkpoint while its group is still in Redis. The audit
only reads, and is safe while the run is going on. Exit code 1 if anything is violated.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import get_args

import redis

from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import TicketState
from headrace.learner.commands.audit_checks import (
    AuditReport,
    check_data,
    check_streams,
    check_training,
    recorded_states,
)
from headrace.learner.commands.audit_snapshot import take_snapshot

STATES: tuple[TicketState, ...] = get_args(TicketState)


def audit(client: redis.Redis, keys: Keys, folder: Path) -> AuditReport:
    """Raises `ValueError` if Redis has no such run."""
    snapshot = take_snapshot(client, keys, folder)
    report = AuditReport()
    recorded = recorded_states(snapshot.record, report)
    states = {name: recorded.get(name, entry.state) for name, entry in snapshot.ledger.items()}
    report.counts.update(states.values())
    check_streams(snapshot, recorded, report)
    check_data(snapshot, report)
    check_training(snapshot, states, report)
    return report


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
        report = audit(connect(arguments.redis_url), Keys(arguments.run), arguments.runs_folder / arguments.run)
    except (ValueError, redis.RedisError) as error:
        print(f"headrace audit: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        violations = [{"ticket": name, "violation": text} for name, text in report.violations]
        print(json.dumps({"counts": dict(report.counts), "violations": violations, "notes": report.notes}, indent=2))
    else:
        _print(report, arguments.run)
    return 1 if report.violations else 0


def _print(report: AuditReport, run: str) -> None:
    print(f"run {run}: {report.counts.total()} tickets")
    for state in STATES:
        print(f"  {state:10} {report.counts[state]}")
    for note in report.notes:
        print(f"note: {note}")
    for name, text in report.violations:
        print(f"VIOLATION {name}: {text}")
    print(f"{len(report.violations)} violations")


if __name__ == "__main__":
    sys.exit(main())
