"""The `headrace` command: start, steer and inspect runs of asynchronous reinforcement learning.

A mistake in a recipe is reported in one line, before anything starts.

Exit codes: 0 done, 1 failed, 2 refused (an invalid request), 3 nothing is running or it does not answer.
"""

import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.launcher.commands import logs, observe, results, steer
from headrace.launcher.commands.options import (
    FAILED,
    RUNS,
    START,
    JsonOption,
    NewRunOption,
    RunsFolderOption,
    console,
    one_line_errors,
)

if TYPE_CHECKING:
    from headrace.common.config import Recipe

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
DEMO_RECIPE = Path(__file__).parents[1] / "demo" / "tiny-cpu.yaml"
ConfigArgument = Annotated[
    Path,
    typer.Argument(help="Recipe, such as configs/tiny-cpu.yaml; default: the demo's.", show_default=False),
]
SeedOption = Annotated[int | None, typer.Option(help="Seed that overrides the recipe's.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Setting that overrides the recipe's; may be given several times."
    ),
]


class SplitName(StrEnum):
    """`headrace.common.tasks.Split`, without the import."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@app.command(rich_help_panel=START)
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for the files; it is created if necessary.")] = Path(),
    environment: Annotated[
        bool, typer.Option("--environment", help="Write a task of several turns, with `rollout` in place of `reward`.")
    ] = False,
) -> None:
    """Write a recipe and a task of your own to begin with: a small example that runs on a CPU."""
    from headrace.launcher.commands.init import init as write_files
    from headrace.launcher.commands.init import next_commands

    with one_line_errors(OSError):
        for path in write_files(folder, "environment" if environment else "task"):
            print(f"wrote {path}")
    print("\nNext:")
    for command in next_commands(folder):
        print(f"  {command}")


@app.command(rich_help_panel=START)
def check(
    config: ConfigArgument = DEMO_RECIPE,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe without starting a run; print every setting with its source, and estimates."""
    from headrace.launcher.check.command import check_recipe

    with one_line_errors():
        check_recipe(_load(config, seed, overrides), console(), as_json)


@app.command(name="try", rich_help_panel=START)
def try_(
    config: ConfigArgument = DEMO_RECIPE,
    split: Annotated[SplitName, typer.Option(help="Split of the prompts.")] = SplitName.TRAIN,
    num: Annotated[int, typer.Option(min=1, max=256, help="Number of prompts, from the beginning of the split.")] = 4,
    url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint in place of an engine on the recipe's model; its key: OPENAI_API_KEY."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model at that endpoint; default: its only one.")
    ] = None,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
) -> None:
    """Play a few episodes of a recipe's task, or score a few completions, and print the conversations."""
    from headrace.launcher.trial.command import try_recipe

    with one_line_errors():
        recipe = _load(config, seed, overrides)
        if not try_recipe(recipe.config, console(), split.value, num, url, model):
            raise typer.Exit(FAILED)


@app.command(rich_help_panel=START)
def up(
    config: ConfigArgument = DEMO_RECIPE,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: NewRunOption = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Number of replicas; overrides generation.replicas and an earlier `headrace scale`."),
    ] = None,
    new_epoch: Annotated[
        bool,
        typer.Option(
            "--new-epoch",
            help="Accept other data, another seed or another task for an existing run, from its next epoch.",
        ),
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
        run_everything(recipe, name, runs_folder, console(), is_number_given, as_json, new_epoch)


@app.command(rich_help_panel=START)
def replay(
    recording: Annotated[Path, typer.Argument(help="Recording, written by `headrace record`.")],
    config: Annotated[Path | None, typer.Option(help="Recipe; default: the recording's own configuration.")] = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: NewRunOption = None,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Train on a recording, without any replica."""
    from headrace.launcher.commands.replay import replay as train_on_recording

    with one_line_errors():
        recipe = _load(config, None, overrides) if config else None
        code = train_on_recording(recording, recipe, overrides, run or f"replay-{_new_name(recording)}", runs_folder)
    raise typer.Exit(code)


@app.command(
    name="make-demo-policy",
    rich_help_panel=START,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def make_demo_policy(context: typer.Context) -> None:
    """Make one of the demo's policies (two to seven minutes on one core); options: make-demo-policy --help."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "headrace.learner.demo_policy.make", *context.args]))


for part in (steer, observe, logs, results):
    app.add_typer(part.app)


def _new_name(origin: Path) -> str:
    return f"{origin.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _load(config: Path, seed: int | None, overrides: list[str]) -> "Recipe":
    """The recipe. This process and all that it starts look for the task in the recipe's folder, too."""
    from headrace.common.config import load_recipe
    from headrace.common.tasks import add_import_folder

    add_import_folder(config.parent)
    return load_recipe(config, overrides if seed is None else [*overrides, f"seed={seed}"])


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
