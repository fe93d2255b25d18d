"""The results of a kill matrix for people and CI: a table, `summary.json`, and whether it succeeded."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from chaos.accounting import LOST, TWICE, Violation
from chaos.matrix import Results
from chaos.test_bed import InjectedFault

MAX_LOSS_OF_ACCURACY = 0.08
COUNTED = ("lost", "trained_twice", "violations")


def summarise(
    results: Results, seed: int, held_out_after: float | None, undisturbed: float | None, disk_problem: str
) -> dict[str, Any]:
    """`held_out_after_undisturbed` is null if there was no such run. Recoveries are of faults that no other one
    overlapped, and of the last one of overlapping faults."""
    numbers = {kind: [s.fault.number for s in results.injected if s.fault.kind == kind] for kind in _kinds(results)}
    return {
        "seed": seed,
        "faults": len(results.injected),
        **_counts(list(results.violations)),
        "recovery_s": _recovery(results.injected),
        "held_out_after": held_out_after,
        "held_out_after_undisturbed": undisturbed,
        "steps": results.num_steps,
        "audits": results.num_audits,
        "groups": asdict(results.groups),
        "dead": results.dead,
        "failure": results.failure,
        "not_tried": {"fill_disk": disk_problem} if disk_problem else {},
        "kinds": {
            kind: {
                "faults": len(numbers[kind]),
                "overlapped": sum(s.recovery_s is None for s in results.injected if s.fault.kind == kind),
                "recovery_s": _recovery([s for s in results.injected if s.fault.kind == kind]),
                **_counts([v for v, number in results.violations.items() if number in numbers[kind]]),
            }
            for kind in numbers
        },
        "details": [
            {
                "number": s.fault.number,
                "kind": s.fault.kind,
                "target": s.target,
                "overlaps": s.fault.overlaps,
                "held_s": round((s.ended_s or s.began_s) - s.began_s, 2),
                "recovery_s": None if s.recovery_s is None else round(s.recovery_s, 2),
                "note": s.note,
            }
            for s in results.injected
        ],
        "violations_found": [{"ticket": v.ticket, "violation": v.text} for v in results.violations],
    }


def problems(summary: dict[str, Any]) -> list[str]:
    """The reasons why the matrix failed; empty if it succeeded."""
    found = [f"the schedule was not completed: {summary['failure']}"] if summary["failure"] else []
    found += [f"{summary[key]} {key.replace('_', ' ')}" for key in COUNTED if summary[key]]
    if summary["dead"]:
        reasons = sorted(set(summary["dead"].values()))
        found.append(f"{len(summary['dead'])} dead tickets: {'; '.join(reasons)}")
    after, undisturbed = summary["held_out_after"], summary["held_out_after_undisturbed"]
    if after is None and not summary["failure"]:
        found.append("no final accuracy")
    elif None not in (after, undisturbed) and after < undisturbed - MAX_LOSS_OF_ACCURACY:
        found.append(f"final accuracy {after:.3f}, undisturbed {undisturbed:.3f}")
    return found


def write_summary(summary: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")


def print_table(summary: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['faults']} faults in {summary['steps']} steps, seed {summary['seed']}")
    table.add_column("fault")
    for name in ("times", "overlapped¹", "recovery p50, s", "max, s", "lost", "trained twice", "violations"):
        table.add_column(name, justify="right")
    for kind, row in sorted(summary["kinds"].items()):
        table.add_row(kind.replace("_", " "), *_cells(row, row["overlapped"]))
    overlapped = sum(row["overlapped"] for row in summary["kinds"].values())
    table.add_section()
    table.add_row("all", *_cells(summary, overlapped))
    console.print(table)
    console.print("¹ by the next fault, before the run had recovered; the recovery is counted from that one")
    for fault, problem in summary["not_tried"].items():
        console.print(f"NOT TRIED: {fault.replace('_', ' ')}: {problem}")
    if summary["held_out_after"] is not None:
        against = summary["held_out_after_undisturbed"]
        beside = "not measured" if against is None else f"{against:.3f}"
        console.print(f"held-out pass@1 after the run {summary['held_out_after']:.3f}, undisturbed {beside}")
    console.print(f"{len(summary['dead'])} dead tickets; {summary['audits']} audits")
    seen = (f"{count} {name.replace('_', ' ')}" for name, count in summary["groups"].items() if count)
    console.print(f"seen: {', '.join(seen)}")


def _kinds(results: Results) -> list[str]:
    return sorted({injected_fault.fault.kind for injected_fault in results.injected})


def _counts(violations: Sequence[Violation]) -> dict[str, int]:
    return {
        "lost": len({violation.ticket for violation in violations if violation.text.startswith(LOST)}),
        "trained_twice": len({violation.ticket for violation in violations if violation.text.startswith(TWICE)}),
        "violations": len(violations),
    }


def _recovery(injected: Sequence[InjectedFault]) -> dict[str, float | None]:
    recoveries = [injected_fault.recovery_s for injected_fault in injected if injected_fault.recovery_s is not None]
    if not recoveries:
        return {"p50": None, "max": None}
    return {"p50": round(median(recoveries), 1), "max": round(max(recoveries), 1)}


def _cells(row: dict[str, Any], overlapped: int) -> list[str]:
    recovery = [row["recovery_s"][name] for name in ("p50", "max")]
    shown = ["–" if value is None else f"{value:.1f}" for value in recovery]
    return [
        str(row["faults"]),
        str(overlapped),
        *shown,
        *(str(row[key]) for key in COUNTED),
    ]
