"""Turns the answers of the control service into text and tables for a terminal. Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from headrace.common.process.redaction import printable

Answer = dict[str, Any]

COLOURS = {"healthy": "green", "waiting": "cyan", "warning": "yellow", "critical": "bold red", "ended": "blue"}
GROUP_STATES = ("trained", "uniform", "stale", "evaluated", "dead_letters")
MINUTE_S, HOUR_S = 60, 3600


def verdict_line(status: Answer) -> Text:
    verdict = status["verdict"]
    since = f" (for {duration(status['at'] - verdict['since_at'])})" if verdict["level"] != "ended" else ""
    text = Text.assemble((f"{status['run']}: {verdict['text']}", COLOURS.get(verdict["level"], "")), (since, "dim"))
    return text.append(f"\n  → {verdict['advice']}") if verdict["advice"] else text


def status_lines(status: Answer) -> Text:
    """The status as text, the verdict first."""
    held_out, replicas, queues = status["latest_evaluation"], status["replicas"], status["queues"]
    staleness, rates, counts = status["staleness"], status["rates"], status["counts"]
    left = f", about {duration(status['remaining_s'])} left" if status["remaining_s"] is not None else ""
    target = f"{replicas['desired']} desired" if replicas["desired"] is not None else "no target set"
    best = ", the best so far" if held_out and held_out["is_best"] else ""
    rows = {
        "step": f"{status['step']} of {status['target_steps']}, weight version {status['weight_version']}, "
        f"{_phase(status)}",
        "time": f"{duration(status['wall_s'])}{left}",
        "reward": f"{number(status['sampled_reward_mean'], 3)}, staleness {number(staleness['mean'])} mean, "
        f"{number(staleness['max'], 0)} max",
        "held-out": f"{number(held_out['held_out'], 3)} after step {held_out['step']}{best}" if held_out else "–",
        "rates": f"{number(rates['generated_tokens_per_s'], 0)} tokens/s generated, "
        f"{number(rates['trained_tokens_per_s'], 0)} trained, {number(rates['steps_per_hour'], 0)} steps/hour",
        "idle": f"learner {share(rates['learner_idle_share'])}, replicas {share(rates['replicas_idle_share'])}",
        "queues": f"{queues['open_tickets']} tickets open ({queues['leased_tickets']} leased), "
        f"{queues['group_stream_length']} groups, {queues['evaluation_tickets']} of an evaluation, "
        f"{queues['dead_letters']} dead letters",
        "groups": ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in GROUP_STATES),
        "replicas": f"{replicas['running']} of {replicas['live']} running, {target}, {replicas['advised'] or '?'} "
        f"advised{': ' if replicas['advice'] else ''}{replicas['advice']}",
    }
    rows |= {f"{wait['component']} waits": wait["text"] for wait in status["waits"]}
    text = verdict_line(status)
    for check in status["checks"]:
        if check["level"] not in ("healthy", "ended") and check["text"] != status["verdict"]["text"]:
            text.append(f"\n  {check['name']}: {check['text']}", COLOURS.get(check["level"], ""))
    for name, value in rows.items():
        text.append(f"\n{name:9} ", "dim").append(value)
    return text


def replicas_table(answer: Answer) -> Table:
    columns = (
        "replica",
        "state",
        "version",
        "behind",
        "in flight",
        "committed",
        "tokens/s",
        "idle",
        "pause p50",
        "p95",
    )
    rows = [
        (
            one["id"],
            Text(f"{one['state']} {one['reason']}".rstrip(), "" if one["state"] == "running" else "yellow"),
            str(one["weight_version"]),
            str(one["versions_behind"]),
            str(one["groups_in_flight"]),
            str(one["groups_committed"]),
            number(one["tokens_per_s"], 0),
            share(one["idle_share"]),
            f"{number(one['swap_pauses']['p50_ms'], 0)} ms",
            f"{number(one['swap_pauses']['p95_ms'], 0)} ms",
        )
        for one in answer["replicas"]
    ]
    return table(columns, rows)


def groups_table(answer: Answer) -> Table:
    columns = ("ticket", "kind", "state", "step", "stale", "replica", "reward", "tokens", "prompt")
    rows = [
        (
            one["id"],
            one["kind"],
            one["state"],
            str(one["step"]),
            "–" if one["staleness"] is None else str(one["staleness"]),
            one["replica"],
            number(sum(one["rewards"]) / max(1, len(one["rewards"]))),
            str(one["num_tokens"]),
            Text(printable(one["prompt"]).replace("\n", " "), overflow="ellipsis", no_wrap=True),
        )
        for one in answer["groups"]
    ]
    return table(columns, rows)


def evaluations_table(evaluations: Sequence[Answer]) -> Table:
    ks = sorted({k for one in evaluations for k in one["pass_at"]} - {"1"}, key=int)
    columns = ("step", "version", "pass@1", *(f"pass@{k}" for k in ks), "completions", "dead", "at", "")
    rows = [
        (
            str(one["step"]),
            "–" if one["weight_version"] is None else str(one["weight_version"]),
            number(one["held_out"], 3),
            *(number(one["pass_at"].get(k), 3) for k in ks),
            str(one["num_completions"]),
            str(one["num_dead"]),
            clock(one["at"]),
            "best" if one["is_best"] else "",
        )
        for one in evaluations
    ]
    return table(columns, rows)


def table(columns: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    made = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        made.add_column(column)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return made


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 2 * MINUTE_S:
        return f"{max(0, seconds):.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"


def _phase(status: Answer) -> str:
    ordered = [word for word, is_so in (("paused", status["is_paused"]), ("stopping", status["is_stopping"])) if is_so]
    asked = [word for word in ordered if word != status["phase"]]
    told = f" (asked: {', '.join(asked)})" if asked else ""
    return f"{status['phase']}{told}" + (f": {status['reason']}" if status["reason"] else "")
