"""The options that several commands share, how commands end, and how they print JSON.

Exit codes: 0 done, 1 failed, 2 refused (an invalid request), 3 nothing is running or it does not answer.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.launcher.run.errors import ControlFailed, NotRunning

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.launcher.run.control_client import ControlClient

FAILED, REFUSED, NOT_RUNNING = 1, 2, 3
START, STEER, LOOK, RECORDS = "Start a run", "Steer a run", "Look at a run", "What a run leaves"
"""The panels of `headrace --help`."""


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Completes the names of the runs in the runs folder, for the shell."""
    folder = Path(context.params.get("runs_folder") or "runs")
    names = (path.parent.name for path in folder.glob("*/config.yaml"))
    return sorted(name for name in names if name.startswith(incomplete))


RunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        "-r",
        metavar="NAME",
        help="Name of the run; default: the only live run. If none is live, commands that work on ended runs take the "
        "newest one in the runs folder.",
        autocompletion=complete_run,
    ),
]
NewRunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        "-r",
        metavar="NAME",
        help="Name of the run; default: a new name, of the file and the time. An existing run continues.",
        autocompletion=complete_run,
    ),
]
RunsFolderOption = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
RUNS = Path("runs")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_URL",
        help="URL of the run's control service; default: the one in the run's folder. The token is taken from "
        "HEADRACE_TOKEN, else from the run's folder.",
    ),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_REDIS_URL",
        help="URL of the run's Redis; default: the running launcher's, else a temporary server started on the run's "
        "append-only file.",
    ),
]


@contextmanager
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """`ValueError` (always expected) and `expected` end the command with one line and its exit code."""
    expected = (ValueError, NotRunning, ControlFailed, *expected)
    try:
        yield
    except expected as error:
        print(f"headrace: {error}", file=sys.stderr)
        code = NOT_RUNNING if isinstance(error, NotRunning) else REFUSED if isinstance(error, ValueError) else FAILED
        raise typer.Exit(code) from error


@contextmanager
def control_of(run: str | None, url: str | None, runs_folder: Path) -> Iterator["ControlClient"]:
    """The control service of the named run, or of the only live one; errors end the command with one line."""
    from headrace.launcher.run.control_client import find_control

    with one_line_errors():
        yield find_control(run, url, runs_folder)


def print_json(answer: Any, one_line: bool = False) -> None:
    """Prints JSON that the terminal's width does not break into lines."""
    print(json.dumps(answer, indent=None if one_line else 2, ensure_ascii=False), flush=True)


def console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)
