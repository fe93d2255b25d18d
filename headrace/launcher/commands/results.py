"""Commands on what a run leaves, live or ended: its ledger, groups, weights, and a report of it all.

Most of them run a module of the learner's in a process of its own, with the run's Redis.
"""

import subprocess
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrace.launcher.commands.options import (
    RECORDS,
    RUNS,
    JsonOption,
    RedisUrlOption,
    RunOption,
    RunsFolderOption,
    one_line_errors,
    print_json,
)

app = typer.Typer()


class DeadLetterAction(StrEnum):
    LIST = "list"
    RETRY = "retry"
    PURGE = "purge"


@app.command(rich_help_panel=RECORDS)
def report(
    run: RunOption = None,
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the run's folder.")] = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Write one HTML file with the run's curves, configuration, problems, evaluations and examples."""
    from headrace.launcher.report.html_report import write_report
    from headrace.launcher.run.live_runs import choose_run

    with one_line_errors(OSError):
        name = choose_run(run, runs_folder, redis_url)
        path = write_report(name, runs_folder, output, redis_url)
        print_json({"run": name, "report": str(path)}) if as_json else print(path)


@app.command(rich_help_panel=RECORDS)
def audit(
    run: RunOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Account for every ticket of a run; exit with 1 if ledger, streams, checkpoints and steps contradict."""
    _call_with_redis("headrace.learner.commands.audit", _json(as_json), run, runs_folder, redis_url)


@app.command(name="dead-letters", rich_help_panel=RECORDS)
def dead_letters(
    action: Annotated[
        DeadLetterAction,
        typer.Argument(help="list: show them with their reasons. retry: issue them again. purge: delete them."),
    ],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[TICKET]...", help="Tickets; default: all dead letters.")
    ] = None,
    run: RunOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """List the tickets that failed for good, with their reasons; issue them again; or delete them."""
    arguments = [action, *(ids or []), *_json(as_json)]
    _call_with_redis("headrace.learner.commands.dead_letters", arguments, run, runs_folder, redis_url)


@app.command(rich_help_panel=RECORDS)
def export(
    output: Annotated[Path, typer.Option(help="Folder to write to; it must not exist, or be empty.")],
    run: RunOption = None,
    best: Annotated[bool, typer.Option("--best", help="Export the best policy by held-out accuracy.")] = False,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of a checkpoint that is still kept, or of the best policy.")
    ] = None,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Write a run's policy in Hugging Face format: the finished run's, its best, or a checkpoint's."""
    which = [*(["--best"] if best else []), *([] if step is None else ["--step", str(step)])]
    _call("headrace.learner.commands.export", ["--output", str(output), *which], run, runs_folder)


@app.command(rich_help_panel=RECORDS)
def simulate(
    run: RunOption = None,
    up_to: Annotated[
        int | None, typer.Option(min=1, help="Largest number of replicas; default: generation.max_replicas.")
    ] = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Simulate a run with other numbers of replicas, from what it has measured; starts and changes nothing."""
    most = [] if up_to is None else ["--up-to", str(up_to)]
    _call("headrace.learner.commands.simulate", [*most, *_json(as_json)], run, runs_folder)


@app.command(rich_help_panel=RECORDS)
def record(
    run: RunOption = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write to; default: recording.msgpack in the run's folder.")
    ] = None,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Follow a run and write its groups and configuration into a recording, for `headrace replay`."""
    arguments = ["--output", str(output)] if output else []
    _call_with_redis("headrace.learner.commands.record", arguments, run, runs_folder, redis_url, if_ended=["--ended"])


@app.command(rich_help_panel=RECORDS)
def openapi() -> None:
    """Print the control service's OpenAPI document."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "headrace.control", "--openapi"]))


def _call(module: str, arguments: Sequence[str], run: str | None, runs_folder: Path) -> None:
    """Runs a module that needs the run's folder alone."""
    from headrace.launcher.run.live_runs import choose_run

    with one_line_errors():
        of_run = ["--run", choose_run(run, runs_folder), "--runs-folder", str(runs_folder)]
        code = subprocess.call([sys.executable, "-m", module, *of_run, *arguments])
    raise typer.Exit(code)


def _call_with_redis(
    module: str,
    arguments: Sequence[str],
    run: str | None,
    runs_folder: Path,
    redis_url: str | None,
    if_ended: Sequence[str] = (),
) -> None:
    """Runs a module that needs the run's Redis. `if_ended`: further arguments if no process of the run is running."""
    from headrace.launcher.run.live_runs import choose_run
    from headrace.launcher.run.open_run import open_run
    from headrace.launcher.run.processes import call_module

    with one_line_errors():
        name = choose_run(run, runs_folder, redis_url)
        with open_run(name, runs_folder, redis_url) as opened:
            of_run = ["--run", name, "--runs-folder", str(runs_folder)]
            code = call_module(module, [*arguments, *of_run, *(if_ended if opened.has_ended else ())], opened.url)
    raise typer.Exit(code)


def _json(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []
