"""Commands that show what a run is doing, as its control service reports it: for people, or as JSON."""

import time
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from headrace.launcher.commands.options import (
    LOOK,
    RUNS,
    JsonOption,
    RunOption,
    RunsFolderOption,
    UrlOption,
    console,
    control_of,
    print_json,
)
from headrace.launcher.run.errors import ControlFailed, NotRunning

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.launcher.run.control_client import ControlClient

app = typer.Typer()
WATCH_INTERVAL_S = 1.0


class State(StrEnum):
    """`headrace.common.wire.DecidedState`, without the import."""

    TRAINED = "trained"
    UNIFORM = "uniform"
    STALE = "stale"
    EVALUATED = "evaluated"


class Kind(StrEnum):
    """`headrace.common.wire.TicketKind`, without the import."""

    TRAIN = "train"
    EVAL = "eval"


@app.command(rich_help_panel=LOOK)
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Update every second until the run ends.")] = False,
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Show the verdict on a live run and its state; with --watch --json one line whenever something changes."""
    from headrace.launcher.terminal.render import status_lines

    with control_of(run, url, runs_folder) as control:
        if watch:
            _watch(control, as_json, console())
        elif as_json:
            print_json(control.get("/status"))
        else:
            console().print(status_lines(control.get("/status")), soft_wrap=True)


@app.command(rich_help_panel=LOOK)
def replicas(
    run: RunOption = None, url: UrlOption = None, as_json: JsonOption = False, runs_folder: RunsFolderOption = RUNS
) -> None:
    """List the live replicas with state, weight version, throughput and weight pauses."""
    from headrace.launcher.terminal.render import replicas_table

    with control_of(run, url, runs_folder) as control:
        answer = control.get("/replicas")
        print_json(answer) if as_json else _print_table(replicas_table(answer), len(answer["replicas"]), "replica")


@app.command(rich_help_panel=LOOK)
def groups(
    ticket: Annotated[
        str | None, typer.Argument(metavar="[TICKET]", help="Ticket whose group is shown token by token.")
    ] = None,
    state: Annotated[State | None, typer.Option(help="Only groups in this state.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only groups of this kind.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only groups of this replica.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only groups decided at this step.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=256, help="Largest number of groups.")] = 20,
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Show samples of recent groups; with TICKET one group, coloured where learner and engine differ."""
    from headrace.launcher.terminal.group_text import group_text
    from headrace.launcher.terminal.render import groups_table

    with control_of(run, url, runs_folder) as control:
        if ticket is not None:
            group = control.get(f"/groups/{quote(ticket, safe='')}")
            print_json(group) if as_json else console().print(group_text(group), soft_wrap=True)
            return
        answer = control.get("/groups", state=state, kind=kind, replica=replica, step=step, limit=limit)
        print_json(answer) if as_json else _print_table(groups_table(answer), len(answer["groups"]), "group")


@app.command(rich_help_panel=LOOK)
def evaluations(
    now: Annotated[
        bool, typer.Option("--now", help="Request an evaluation of the newest weights, beside training.")
    ] = False,
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Show held-out accuracy over the run's steps, or request an evaluation."""
    from headrace.launcher.terminal.render import evaluations_table

    with control_of(run, url, runs_folder) as control:
        if now:
            answer = control.send("POST", "/evaluations")
            print_json(answer) if as_json else print(answer["text"])
            return
        found = control.get("/evaluations")
        print_json(found) if as_json else _print_table(evaluations_table(found), len(found), "evaluation")


def _print_table(table: Any, count: int, what: str) -> None:
    """Prints the table; in a pipe as wide as its columns need."""
    if count:
        terminal = console()
        terminal.width = terminal.width if terminal.is_terminal else 10_000
        terminal.print(table)
    print(f"{count} {what}{'s' * (count != 1)}")


def _watch(control: "ControlClient", as_json: bool, terminal: "Console") -> None:
    """Until the run has ended, or Ctrl-C; goes on while control does not answer."""
    from rich.live import Live
    from rich.text import Text

    from headrace.launcher.terminal.render import status_lines

    shown: Any = None
    with suppress(KeyboardInterrupt), Live(console=terminal, auto_refresh=False) as live:
        while True:
            status: dict[str, Any] | None = None
            try:
                status = control.get("/status")
                news: Any = _watched_fields(status)
            except (NotRunning, ControlFailed) as error:
                news = str(error)
            if terminal.is_terminal and not as_json:
                live.update(Text(news, "red") if status is None else status_lines(status), refresh=True)
            elif news != shown:
                _print_news(status, news, as_json, terminal)
            shown = news
            if status is not None and status["verdict"]["level"] == "ended":
                return
            time.sleep(WATCH_INTERVAL_S)


def _watched_fields(status: dict[str, Any]) -> tuple[Any, ...]:
    """The status fields whose change is printed."""
    verdict, replicas = status["verdict"], status["replicas"]
    return verdict["level"], verdict["text"], status["phase"], status["step"], replicas["running"], replicas["desired"]


def _print_news(status: dict[str, Any] | None, news: Any, as_json: bool, terminal: "Console") -> None:
    from rich.text import Text

    from headrace.launcher.terminal.render import verdict_line

    if as_json:
        print_json({"error": news} if status is None else status, one_line=True)
    elif status is None:
        terminal.print(Text(news), soft_wrap=True)
    else:
        head = Text(f"step {status['step']} of {status['target_steps']}, {status['phase']}; ")
        terminal.print(head.append_text(verdict_line(status)), soft_wrap=True)
