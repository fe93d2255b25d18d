"""The `headrace` command. What is wrong with a configuration is said in one line, before anything starts."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.config import ConfigError, Recipe, load_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

ConfigArgument = Annotated[Path, typer.Argument(help="A recipe, such as configs/tiny-cpu.yaml.")]
SeedOption = Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")]
SetOption = Annotated[list[str], typer.Option("--set", help="section.key=value, any number of times.")]


@app.command()
def up(
    config: ConfigArgument,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: Annotated[str | None, typer.Option(help="Name of the run; an existing one goes on where it stopped.")] = None,
    runs_folder: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
) -> None:
    """Run everything on this machine until the run is complete."""
    from services.launcher.up import Failed
    from services.launcher.up import up as run_everything

    with _one_line_errors(ConfigError, ValueError, Failed):
        recipe = _load(config, seed, overrides)
        name = run or f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_everything(recipe, name, runs_folder, Console(highlight=False))


@app.command()
def check(config: ConfigArgument, seed: SeedOption = None, overrides: SetOption = []) -> None:  # noqa: B006
    """Validate a recipe without starting anything; print its settings with their sources, and estimates."""
    from services.launcher.check import check_recipe

    with _one_line_errors(ConfigError, ValueError):
        check_recipe(_load(config, seed, overrides), Console(highlight=False))


@app.command(
    name="warm-start",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def warm_start(context: typer.Context) -> None:
    """Make the demo's warm-started policy (about five minutes on one core); options: warm-start --help."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "services.learner.warm_start", *context.args]))


def _load(config: Path, seed: int | None, overrides: list[str]) -> Recipe:
    return load_recipe(config, overrides if seed is None else [*overrides, f"seed={seed}"])


@contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    try:
        yield
    except expected as error:
        print(f"headrace: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def main() -> None:
    app(prog_name="headrace")


if __name__ == "__main__":
    main()
