"""The `headrace` command: start, steer and inspect runs of asynchronous reinforcement learning.

A mistake in a recipe is reported in one line, before anything starts.

Exit codes: 0 done, 1 failed, 2 refused (an invalid request), 3 nothing is running or it does not answer.
"""

from typing import Annotated

import typer

from headrace.launcher import start_commands
from headrace.launcher.commands import logs, observe, results, steer

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for part in (start_commands, steer, observe, logs, results):
    app.add_typer(part.app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def headrace(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    app(prog_name="headrace")


if __name__ == "__main__":
    main()
