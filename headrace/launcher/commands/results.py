"""What a run has left, or leaves while it goes on: its ledger, groups, logs, weights, and a report of it all."""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from rich.text import Text

from headrace.common.process.logs import Line, shown_line
from headrace.common.process.logs import as_json as as_json_object
from headrace.common.redis.keys import Keys
from headrace.launcher.commands.options import (
    RECORDS,
    RUNS,
    JsonOption,
    OneRunOption,
    RedisUrlOption,
    RunArgument,
    RunsFolderOption,
    one_line_errors,
    out,
    print_json,
)
from headrace.launcher.run.log_files import LEVELS, LogFilter, LogFollower, read_logs
from headrace.launcher.run.open_run import open_run
from headrace.launcher.run.processes import call_module, short_timeout_client
from headrace.launcher.run.run_folder import newest_run, read_url_file

app = typer.Typer()
panel = RECORDS
RECORD_MODULE = "headrace.learner.commands.record"
FOLLOW_INTERVAL_S = 0.2
LINES_BEFORE_FOLLOWING = 20
LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
Level = StrEnum("Level", {name: name.lower() for name in LEVELS})  # type: ignore[misc]


class DeadAction(StrEnum):
    LIST = "list"
    RETRY = "retry"
    PURGE = "purge"


@app.command(rich_help_panel=panel)
def logs(
    service: Annotated[str | None, typer.Option(help="learner, generation, generation-0, control, redis, …")] = None,
    level: Annotated[Level | None, typer.Option(help="Or worse.", case_sensitive=False)] = None,
    ticket: Annotated[str | None, typer.Option(help="All that became of it, in every service.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of the learner.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="What is written from now on, too.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Only the last ones.")] = None,
    run: OneRunOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Every service's log as one, in the order of time; a ticket's also with its state in the ledger."""
    with one_line_errors(), suppress(KeyboardInterrupt):
        name = run or newest_run(runs_folder)
        Keys(name)  # a name that is no folder's
        folder = runs_folder / name
        wanted = LogFilter(service, None if level is None else level.name, ticket, step)
        follower = LogFollower(folder / "logs", wanted) if follow else None
        last = LINES_BEFORE_FOLLOWING if follow and lines is None else lines
        for line in deque(read_logs(folder / "logs", wanted), maxlen=last):
            _print_line(_about(line, ticket), as_json)
        if ticket is not None and (state := _ledger_state(folder, ticket, redis_url)):
            told = {"ticket": ticket, "ledger": state}
            print_json(told, one_line=True) if as_json else print(f"ledger: {ticket} is {state}")
        while follower is not None:
            for line in follower.look():
                _print_line(_about(line, ticket), as_json)
            time.sleep(FOLLOW_INTERVAL_S)


@app.command(rich_help_panel=panel)
def report(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="The file; default: report.html in the run's folder.")] = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Write one HTML file with the run's curves, configuration, verdicts, evaluations and examples."""
    from headrace.launcher.report.html_report import write_report

    with one_line_errors(OSError):
        path = write_report(run, runs_folder, output, redis_url)
        print_json({"run": run, "report": str(path)}) if as_json else print(path)


@app.command(rich_help_panel=panel)
def audit(
    run: RunArgument,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Account for every ticket of a run, going on or ended."""
    _call_on_run("headrace.learner.commands.audit", _json(as_json), run, runs_folder, redis_url)


@app.command(rich_help_panel=panel)
def dead(
    action: DeadAction,
    run: RunArgument,
    ids: Annotated[list[str] | None, typer.Argument(help="Of tickets.")] = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """List the tickets that could not be answered, with their reasons; open them again; or delete them."""
    _call_on_run(
        "headrace.learner.commands.dead_letters", [action, *(ids or []), *_json(as_json)], run, runs_folder, redis_url
    )


@app.command(rich_help_panel=panel)
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="A folder that is not there yet, or empty.")],
    best: Annotated[bool, typer.Option("--best", help="The best by held-out accuracy.")] = False,
    step: Annotated[int | None, typer.Option(min=0, help="Of a checkpoint that is still kept, or of the best.")] = None,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Write a run's policy in Hugging Face format: the finished run's, its best, or a checkpoint's."""
    which = [*(["--best"] if best else []), *([] if step is None else ["--step", str(step)])]
    raise typer.Exit(_call("headrace.learner.commands.export", run, runs_folder, ["--output", str(output), *which]))


@app.command(rich_help_panel=panel)
def plan(
    run: RunArgument,
    up_to: Annotated[int | None, typer.Option(min=1, help="Replicas; default: generation.max_replicas.")] = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Simulate a run with other numbers of replicas, from what it has measured; starts and touches nothing."""
    most = [] if up_to is None else ["--up-to", str(up_to)]
    raise typer.Exit(_call("headrace.learner.commands.plan", run, runs_folder, [*most, *_json(as_json)]))


@app.command(rich_help_panel=panel)
def record(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="The recording's file.")] = None,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Follow a run and write its groups and configuration into a recording that can be trained on again."""
    _call_on_run(RECORD_MODULE, ["--output", str(output)] if output else [], run, runs_folder, redis_url)


@app.command(rich_help_panel=panel)
def openapi() -> None:
    """Print the control service's OpenAPI document."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "headrace.control", "--openapi"]))


def _call(module: str, run: str, runs_folder: Path, arguments: Sequence[str]) -> int:
    place = ["--run", run, "--runs-folder", str(runs_folder)]
    return subprocess.call([sys.executable, "-m", module, *place, *arguments])


def _call_on_run(module: str, arguments: Sequence[str], run: str, runs_folder: Path, redis_url: str | None) -> None:
    with one_line_errors(), open_run(run, runs_folder, redis_url) as opened:
        place = ["--run", run, "--runs-folder", str(runs_folder)]
        ended = ["--ended"] if opened.has_ended and module == RECORD_MODULE else []
        code = call_module(module, [*arguments, *place, *ended], opened.url)
    raise typer.Exit(code)


def _json(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []


def _print_line(line: Line, as_json: bool) -> None:
    if as_json:
        print_json(as_json_object(line), one_line=True)
    else:
        out().print(Text(shown_line(line), LEVEL_COLOURS.get(line.level, "")), soft_wrap=True)


def _about(line: Line, ticket: str | None) -> Line:
    """Of the many tickets of a line only the one that is asked for."""
    if ticket is None or "tickets" not in line.fields:
        return line
    count = line.fields["tickets"].count(",")
    fields = {name: value for name, value in line.fields.items() if name != "tickets"} | {"ticket": ticket}
    return line._replace(fields=fields, message=f"{line.message}, with {count} others" if count else line.message)


def _ledger_state(folder: Path, ticket: str, redis_url: str | None) -> str:
    """What the ledger says now; empty if no Redis of the run can be reached."""
    url = redis_url or read_url_file(folder)
    if not url:
        return ""
    with suppress(redis.RedisError), short_timeout_client(url, 2.0) as client:
        mark: Any = client.hget(Keys(folder.name).ledger, ticket)
        return mark.decode(errors="replace") if mark else "unknown: no ticket of that name was issued"
    return ""
