"""The `headrace` command. What is wrong with a configuration is said in one line, before anything starts.

Exit codes: 0 done, 1 failed, 2 refused: what was asked cannot be, 3 nothing is running or answers.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.common.config import Recipe, load_recipe
from headrace.launcher.commands import observe, results, steer
from headrace.launcher.commands.options import RUNS, JsonOption, RunsFolderOption, one_line_errors

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
START = "Start a run"

ConfigArgument = Annotated[Path, typer.Argument(help="A recipe, such as configs/tiny-cpu.yaml.")]
SeedOption = Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")]
SetOption = Annotated[list[str], typer.Option("--set", help="section.key=value, any number of times.")]


@app.command(rich_help_panel=START)
def up(
    config: ConfigArgument,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: Annotated[str | None, typer.Option(help="Name of the run; an existing one goes on where it stopped.")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Overrides generation.replicas, and what `headrace scale` has ordered of an existing run."),
    ] = None,
    new_epoch: Annotated[
        bool, typer.Option("--new-epoch", help="Data, seed or task of an existing run may differ: from its next epoch.")
    ] = False,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Run everything on this machine until the run is complete."""
    from redis import RedisError

    from headrace.launcher.supervision.restart_policy import ServiceFailed
    from headrace.launcher.up import up as run_everything

    with one_line_errors(ServiceFailed, RedisError):
        number = [] if replicas is None else [f"generation.replicas={replicas}"]
        recipe = _load(config, seed, [*overrides, *number])
        name, is_number_given = run or _new_name(config), replicas is not None
        run_everything(recipe, name, runs_folder, Console(highlight=False), is_number_given, as_json, new_epoch)


@app.command(rich_help_panel=START)
def check(
    config: ConfigArgument,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe without starting anything; print its settings with their sources, and estimates."""
    from headrace.launcher.check.command import check_recipe

    with one_line_errors():
        check_recipe(_load(config, seed, overrides), Console(highlight=False), as_json)


@app.command(rich_help_panel=START)
def replay(
    recording: Annotated[Path, typer.Argument(help="What `headrace record` has written.")],
    config: Annotated[Path | None, typer.Option(help="A recipe; default: the recording's own configuration.")] = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Train on a recording, without any replica."""
    from headrace.launcher.commands.replay import replay as train_on_recording

    with one_line_errors():
        recipe = _load(config, None, overrides) if config else None
        code = train_on_recording(recording, recipe, overrides, run or f"replay-{_new_name(recording)}", runs_folder)
    raise typer.Exit(code)


@app.command(
    name="warm-start",
    rich_help_panel=START,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def warm_start(context: typer.Context) -> None:
    """Make the demo's warm-started policy (about five minutes on one core); options: warm-start --help."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "headrace.learner.demo_policy.make", *context.args]))


for part in (observe, steer, results):
    app.add_typer(part.app)


def _new_name(origin: Path) -> str:
    return f"{origin.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _load(config: Path, seed: int | None, overrides: list[str]) -> Recipe:
    """Its folder is where the task is looked for as well, by us and by all that we start."""
    from headrace.common.tasks import look_in

    look_in(config.parent)
    return load_recipe(config, overrides if seed is None else [*overrides, f"seed={seed}"])


def main() -> None:
    app(prog_name="headrace")


if __name__ == "__main__":
    main()
