"""The conclusions from the rows of `benchmarks.scale`: pure functions, except for printing.

The rule: a number of replicas is carried if together they do at least 90 % of that number times the work of one
replica. The first number that is not carried has a bottleneck: of the four components below, the one with the highest
share of its processor time, if that share is at least 85 %; otherwise the limit is not processor time, and is reported
so. Redis and the learner's Python have one core each, and are limits of the design. The processes of simulated replicas
(one core each) and the machine (all its cores) are limits of the benchmark.

The load that the design could carry with enough cores is computed from the row with the most groups per second: Redis
and the learner with one whole core each, at their processor time per group in that row.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
CARRIED = 0.9
BUSY = 0.85
LIMITS = {
    "redis_cpu": "Redis",
    "learner_cpu": "the learner",
    "busiest_replicas_cpu": "the benchmark: a process of simulated replicas",
    "machine": "the benchmark: the machine's cores",
}


def efficiency(row: Row, alone: Row) -> float:
    """The work done as a share of what the replicas would do if each did as much as a single one."""
    return float(row["groups_per_s"] / (alone["groups_per_s"] * row["replicas"] / alone["replicas"]))


def limit_of(row: Row) -> str:
    name = max(LIMITS, key=lambda one: float(row[one]))
    return LIMITS[name] if row[name] >= BUSY else "no processor: what is waited for"


def judge(rows: list[Row]) -> Row:
    """Conclusions from the rows of one stretch, ordered by the number of replicas."""
    alone, most = rows[0], max(rows, key=lambda row: float(row["groups_per_s"]))
    not_carried = [row for row in rows if efficiency(row, alone) < CARRIED]
    redis, learner = (most["groups_per_s"] / most[name] for name in ("redis_cpu", "learner_cpu"))
    tokens_per_group = most["tokens_per_s"] / most["groups_per_s"]
    return {
        "stretch": alone["stretch"],
        "carried": max(row["replicas"] for row in rows if row not in not_carried),
        "first_not_carried": not_carried[0]["replicas"] if not_carried else None,
        "limit": limit_of(not_carried[0]) if not_carried else None,
        "groups_per_s_per_core_of_redis": redis,
        "groups_per_s_per_core_of_the_learner": learner,
        "tokens_per_group": tokens_per_group,
        "first_limit_of_the_design": "Redis" if redis < learner else "the learner",
        "replicas_at_that_limit": min(redis, learner) / (alone["groups_per_s"] / alone["replicas"]),
    }


COLUMNS = {
    "replicas": "{:.0f}",
    "groups_per_s": "{:.1f}",
    "tokens_per_s": "{:,.0f}",
    "step_s": "{:.2f}",
    "learner_waits": "{:.0%}",
    "staleness_mean": "{:.2f}",
    "staleness_p95": "{:.0f}",
    "egress_bytes_per_version": "{:,.0f}",
    "egress_copies": "{:.2f}",
    "redis_commands_per_s": "{:,.0f}",
    "redis_cpu": "{:.0%}",
    "redis_mib": "{:.1f}",
    "learner_cpu": "{:.0%}",
    "replicas_cpu": "{:.0%}",
    "machine": "{:.0%}",
    "others_cpu": "{:.0%}",
}


def report(rows: list[Row], judged: list[Row], console: Console) -> None:
    for verdict in judged:
        chosen = [row for row in rows if row["stretch"] == verdict["stretch"]]
        table = Table(title=f"completions {verdict['stretch']:g} times as long as recorded")
        for name in (*COLUMNS, "efficiency"):
            table.add_column(name.replace("_", " "), justify="right")
        for row in chosen:
            cells = ["" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()]
            table.add_row(*cells, f"{efficiency(row, chosen[0]):.0%}")
        console.print(table)
        for name, value in verdict.items():
            console.print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
