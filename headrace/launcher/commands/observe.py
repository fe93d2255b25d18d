"""What a run is doing: read from its control service, shown for people, or as JSON for programs."""

import time
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any, get_args
from urllib.parse import quote

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from headrace.common.wire import DecidedState, TicketKind
from headrace.launcher.commands.options import (
    LOOK,
    RUNS,
    JsonOption,
    OneRunOption,
    RunsFolderOption,
    UrlOption,
    one_line_errors,
    out,
    print_json,
)
from headrace.launcher.run.control_client import Control, ControlFailed, NotRunning, find_control
from headrace.launcher.terminal.render import (
    evaluations_table,
    group_text,
    groups_table,
    replicas_table,
    status_lines,
    verdict_line,
)

app = typer.Typer()
panel = LOOK
WATCH_INTERVAL_S = 1.0
State = StrEnum("State", {state.upper(): state for state in get_args(DecidedState)})  # type: ignore[misc]
Kind = StrEnum("Kind", {kind.upper(): kind for kind in get_args(TicketKind)})  # type: ignore[misc]


@app.command(rich_help_panel=panel)
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until the run ends.")] = False,
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Is the run well? The verdict first, then where it is. With --watch --json: a line whenever something changes."""
    with one_line_errors():
        control = find_control(run, url, runs_folder)
        if watch:
            _watch(control, as_json, out())
        elif as_json:
            print_json(control.get("/status"))
        else:
            out().print(status_lines(control.get("/status")), soft_wrap=True)


@app.command(rich_help_panel=panel)
def replicas(
    run: OneRunOption = None, url: UrlOption = None, as_json: JsonOption = False, runs_folder: RunsFolderOption = RUNS
) -> None:
    """Every live replica: state, weight version, throughput, weight pauses."""
    with one_line_errors():
        answer = find_control(run, url, runs_folder).get("/replicas")
        print_json(answer) if as_json else _print_table(replicas_table(answer), len(answer["replicas"]), "replica")


@app.command(rich_help_panel=panel)
def groups(
    ticket: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of a ticket: that group, token by token.")
    ] = None,
    state: Annotated[State | None, typer.Option(help="Only these.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only these.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only those decided at it.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=256)] = 20,
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """A sample of what the model has written lately; with ID one group, coloured where learner and engine differ."""
    with one_line_errors():
        control = find_control(run, url, runs_folder)
        if ticket is not None:
            group = control.get(f"/groups/{quote(ticket, safe='')}")
            print_json(group) if as_json else out().print(group_text(group), soft_wrap=True)
            return
        answer = control.get("/groups", state=state, kind=kind, replica=replica, step=step, limit=limit)
        print_json(answer) if as_json else _print_table(groups_table(answer), len(answer["groups"]), "group")


@app.command(name="eval", rich_help_panel=panel)
def evaluations(
    now: Annotated[bool, typer.Option("--now", help="Ask for one of the newest weights, beside training.")] = False,
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """RedisContent-out accuracy over the run's steps."""
    with one_line_errors():
        control = find_control(run, url, runs_folder)
        if now:
            answer = control.order("POST", "/evaluations")
            print_json(answer) if as_json else print(answer["text"])
            return
        found = control.get("/evaluations")
        print_json(found) if as_json else _print_table(evaluations_table(found), len(found), "evaluation")


def _print_table(table: Any, count: int, what: str) -> None:
    """Not narrower in a pipe than its columns need."""
    if count:
        console = out()
        console.width = console.width if console.is_terminal else 10_000
        console.print(table)
    print(f"{count} {what}{'s' * (count != 1)}")


def _watch(control: Control, as_json: bool, console: Console) -> None:
    """Goes on while control is away; until the run has ended, or Ctrl-C."""
    shown: Any = None
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            found: dict[str, Any] | None = None
            try:
                found = control.get("/status")
                told: Any = _changes(found)
            except (NotRunning, ControlFailed) as error:
                told = str(error)
            if console.is_terminal and not as_json:
                live.update(Text(told, "red") if found is None else status_lines(found), refresh=True)
            elif told != shown:
                _tell(found, told, as_json, console)
            shown = told
            if found is not None and found["verdict"]["level"] == "ended":
                return
            time.sleep(WATCH_INTERVAL_S)


def _changes(status: dict[str, Any]) -> tuple[Any, ...]:
    """What of it is worth a line."""
    verdict, replicas = status["verdict"], status["replicas"]
    return verdict["level"], verdict["text"], status["phase"], status["step"], replicas["running"], replicas["desired"]


def _tell(found: dict[str, Any] | None, told: Any, as_json: bool, console: Console) -> None:
    if as_json:
        print_json({"error": told} if found is None else found, one_line=True)
    elif found is None:
        console.print(Text(told), soft_wrap=True)
    else:
        head = Text(f"step {found['step']} of {found['target_steps']}, {found['phase']}; ")
        console.print(head.append_text(verdict_line(found)), soft_wrap=True)
