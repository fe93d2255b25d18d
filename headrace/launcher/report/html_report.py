"""`headrace report`: one self-contained HTML file that shows how a run went.

It reads metrics, configuration, summary and logs from the run's folder. If the run's Redis is live, or left an
append-only file, it also shows the audit of the ledger and examples of groups. All texts are untrusted and escaped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
import redis

from headrace.common.config import yaml_text
from headrace.common.metrics.thresholds import has_exact_numerics
from headrace.common.redis.keys import Keys
from headrace.common.wire.group_samples import GroupSample
from headrace.launcher.report import curves
from headrace.launcher.report.example_blocks import blocks
from headrace.launcher.report.headline import headline, settings
from headrace.launcher.report.panels import panels
from headrace.launcher.report.problems import incidents, unhealthy_spans
from headrace.launcher.report.rows import Row
from headrace.launcher.run.log_files import LogFilter, log_files, read_logs
from headrace.launcher.run.open_run import open_run
from headrace.launcher.run.processes import REDIS_URL_VARIABLE
from headrace.launcher.run.redis_server import short_timeout_client
from headrace.launcher.terminal.group_text import ENDS, message_text, spans
from headrace.launcher.terminal.render import duration

REPORT_FILE = "report.html"
AUDIT_TIMEOUT_S = 300.0
WANTED_EXAMPLES = {"trained": 4, "uniform": 2, "stale": 1, "evaluated": 2}
MAX_ROLLOUTS = 4
"""Rollouts that are shown of one example."""


class RedisContent(NamedTuple):
    """The part of a report that is only in Redis."""

    audit: dict[str, Any] | None = None
    groups: Sequence[GroupSample] = ()
    problem: str = ""


def write_report(run: str, runs_folder: Path, output: Path | None, redis_url: str | None) -> Path:
    """Returns the file. Raises `ValueError` if there is no such run."""
    Keys(run)  # refuses a name that cannot be a folder's
    folder = runs_folder / run
    rows = _rows(folder / "metrics.jsonl")
    if not folder.is_dir() or not (rows or (folder / "config.yaml").exists()):
        raise ValueError(f"run {run!r}: there is nothing to report in {folder}")
    config = _read(folder / "config.yaml", yaml_text.load) or {}
    content = _redis_content(run, runs_folder, redis_url)
    path = output or folder / REPORT_FILE
    path.write_text(render(run, rows, config, _read(folder / "summary.json", json.loads), content, folder / "logs"))
    return path


def render(run: str, rows: Sequence[Row], config: Row, summary: Row | None, content: RedisContent, logs: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"clock": _clock, "duration": duration, "spans": spans, "readable": curves.format_number}
    environment.filters |= {"said": message_text}
    environment.globals |= {"ENDS": ENDS}
    told, num_left_out = incidents(read_logs(logs, LogFilter(level="WARNING")) if log_files(logs) else [])
    dtype = (config.get("model") or {}).get("dtype")
    engine = (config.get("generation") or {}).get("engine") or {}
    is_exact = has_exact_numerics(dtype, engine.get("swap_mode"))
    return environment.get_template("report.html.jinja").render(
        run=run,
        now=datetime.now(UTC).timestamp(),
        headline=headline(rows, (config.get("learner") or {}).get("steps"), summary),
        is_complete=summary is not None,
        panels=[(panel, curves.draw(panel.series, panel.is_share)) for panel in panels(rows)],
        evaluations=[row for row in rows if row.get("kind") == "evaluation"],
        unhealthy_spans=unhealthy_spans(rows, is_exact),
        incidents=told,
        num_left_out=num_left_out,
        settings=settings(config),
        content=content,
        examples=[
            (group, [(one, blocks(group, one)) for one in group.rollouts[:MAX_ROLLOUTS]]) for group in content.groups
        ],
    )


def _redis_content(run: str, runs_folder: Path, redis_url: str | None) -> RedisContent:
    try:
        with open_run(run, runs_folder, redis_url) as opened:
            return RedisContent(_audit(run, runs_folder, opened.url), _examples(opened.url, Keys(run)))
    except (ValueError, redis.RedisError) as error:
        return RedisContent(problem=str(error))


def _audit(run: str, runs_folder: Path, url: str) -> dict[str, Any] | None:
    place = ["--run", run, "--runs-folder", str(runs_folder), "--json"]
    command = [sys.executable, "-m", "headrace.learner.commands.audit", *place]
    with suppress(subprocess.TimeoutExpired, ValueError):
        environment = os.environ | {REDIS_URL_VARIABLE: url}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    return None


def _examples(url: str, keys: Keys) -> list[GroupSample]:
    """The newest samples of each state."""
    left = dict(WANTED_EXAMPLES)
    found = []
    with short_timeout_client(url, 10.0) as client:
        rows: Any = client.xrevrange(keys.samples)
    for _, fields in rows:
        with suppress(msgspec.MsgspecError):
            group = msgspec.json.decode(fields.get(b"group", b""), type=GroupSample)
            if left.get(group.state, 0) > 0:
                left[group.state] -= 1
                found.append(group)
    return sorted(found, key=lambda group: (list(WANTED_EXAMPLES).index(group.state), -group.step))


def _rows(path: Path) -> list[Row]:
    """Complete rows only: a killed writer may have left half a line."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _read(path: Path, parse: Callable[[str], Any]) -> Row | None:
    with suppress(OSError, ValueError):
        found = parse(path.read_text())
        return found if isinstance(found, dict) else None
    return None


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
