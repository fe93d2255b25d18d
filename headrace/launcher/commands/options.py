"""What several commands take, how they end, and how they print for programs.

Exit codes: 0 done, 1 failed, 2 refused: what was asked cannot be, 3 nothing is running or answers.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from headrace.launcher.run.control_client import ControlFailed, NotRunning

FAILED, REFUSED, NOTHING_RUNS = 1, 2, 3
STEER, LOOK, RECORDS = "Steer a run", "Look at a run", "What a run leaves"


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names from the runs folder, for the shell."""
    folder = Path(context.params.get("runs_folder") or "runs")
    names = (path.parent.name for path in folder.glob("*/config.yaml"))
    return sorted(name for name in names if name.startswith(incomplete))


RunArgument = Annotated[str, typer.Argument(help="Name of the run.", autocompletion=complete_run)]
OneRunOption = Annotated[
    str | None,
    typer.Option("--run", help="Name of the run; default: the only one going on.", autocompletion=complete_run),
]
RunsFolderOption = Annotated[Path, typer.Option(help="Where runs are kept.")]
RUNS = Path("runs")
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_URL",
        help="Of the run's control service; default: what the run's folder says. Token: HEADRACE_TOKEN, or the run's.",
    ),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_REDIS_URL",
        help="Default: that of the running launcher, else a server on the run's append-only file, for the time of it.",
    ),
]


@contextmanager
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """`ValueError` (always expected) and `expected` end the command with a line and its code."""
    expected = (ValueError, NotRunning, ControlFailed, *expected)
    try:
        yield
    except expected as error:
        print(f"headrace: {error}", file=sys.stderr)
        code = NOTHING_RUNS if isinstance(error, NotRunning) else REFUSED if isinstance(error, ValueError) else FAILED
        raise typer.Exit(code) from error


def print_json(answer: Any, one_line: bool = False) -> None:
    """Not broken into lines by the terminal's width."""
    print(json.dumps(answer, indent=None if one_line else 2, ensure_ascii=False), flush=True)


def out() -> Console:
    return Console(highlight=False)
