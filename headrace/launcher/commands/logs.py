"""`headrace logs`: the logs of every service of a run as one, filtered, and followed."""

import time
from collections import deque
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.launcher.commands.options import (
    RECORDS,
    RUNS,
    JsonOption,
    RedisUrlOption,
    RunOption,
    RunsFolderOption,
    console,
    one_line_errors,
    print_json,
)

if TYPE_CHECKING:
    from headrace.common.process.logs import LogLine

app = typer.Typer()
FOLLOW_INTERVAL_S = 0.2
LINES_BEFORE_FOLLOWING = 20
LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


@app.command(rich_help_panel=RECORDS)
def logs(
    service: Annotated[
        str | None, typer.Option(help="Service, such as learner, generation, generation-0, control or redis.")
    ] = None,
    level: Annotated[Level | None, typer.Option(help="Minimum level.", case_sensitive=False)] = None,
    ticket: Annotated[str | None, typer.Option(help="Only lines about this ticket, from all services.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only lines about this step of the learner.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also print new lines as they are written.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Print only the last lines.")] = None,
    run: RunOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Print the logs of all services in the order of time; with --ticket also the ticket's state in the ledger."""
    from headrace.launcher.run.live_runs import choose_run
    from headrace.launcher.run.log_files import LogFilter, LogFollower, read_logs

    with one_line_errors(), suppress(KeyboardInterrupt):
        folder = runs_folder / choose_run(run, runs_folder, redis_url)
        wanted = LogFilter(service, None if level is None else level.name, ticket, step)
        follower = LogFollower(folder / "logs", wanted) if follow else None
        last = LINES_BEFORE_FOLLOWING if follow and lines is None else lines
        for line in deque(read_logs(folder / "logs", wanted), maxlen=last):
            _print_line(_with_one_ticket(line, ticket), as_json)
        if ticket is not None and (state := _ledger_state(folder, ticket, redis_url)):
            shown = {"ticket": ticket, "ledger": state}
            print_json(shown, one_line=True) if as_json else print(f"ledger: {ticket} is {state}")
        while follower is not None:
            for line in follower.read_new():
                _print_line(_with_one_ticket(line, ticket), as_json)
            time.sleep(FOLLOW_INTERVAL_S)


def _print_line(line: "LogLine", as_json: bool) -> None:
    from rich.text import Text

    from headrace.common.process import logs as log_lines

    if as_json:
        print_json(log_lines.line_as_dict(line), one_line=True)
    else:
        console().print(Text(log_lines.format_line(line), LEVEL_COLOURS.get(line.level, "")), soft_wrap=True)


def _with_one_ticket(line: "LogLine", ticket: str | None) -> "LogLine":
    """The line with only the given one of its tickets."""
    if ticket is None or "tickets" not in line.fields:
        return line
    count = line.fields["tickets"].count(",")
    fields = {name: value for name, value in line.fields.items() if name != "tickets"} | {"ticket": ticket}
    return line._replace(fields=fields, message=f"{line.message}, with {count} others" if count else line.message)


def _ledger_state(folder: Path, ticket: str, redis_url: str | None) -> str:
    """The ticket's state in the ledger; empty if no Redis of the run can be reached."""
    import redis

    from headrace.common.redis.keys import Keys
    from headrace.launcher.run.redis_server import short_timeout_client
    from headrace.launcher.run.run_folder import read_url_file

    url = redis_url or read_url_file(folder)
    if not url:
        return ""
    with suppress(redis.RedisError), short_timeout_client(url, 2.0) as client:
        entry: Any = client.hget(Keys(folder.name).ledger, ticket)
        return entry.decode(errors="replace") if entry else "unknown: no ticket of that name was issued"
    return ""
