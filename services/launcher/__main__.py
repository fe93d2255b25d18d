"""The `headrace` command. What is wrong with a configuration is said in one line, before anything starts."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.config import ConfigError, Recipe, load_recipe

RECORD_MODULE = "services.learner.record"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

ConfigArgument = Annotated[Path, typer.Argument(help="A recipe, such as configs/tiny-cpu.yaml.")]
RunArgument = Annotated[str, typer.Argument(help="Name of the run.")]
SeedOption = Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")]
SetOption = Annotated[list[str], typer.Option("--set", help="section.key=value, any number of times.")]
RunsFolderOption = Annotated[Path, typer.Option(help="Where runs are kept.")]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_REDIS_URL",
        help="Default: that of the running launcher, else a server on the run's append-only file, for the time of it.",
    ),
]


class DeadAction(StrEnum):
    LIST = "list"
    RETRY = "retry"
    PURGE = "purge"


@app.command()
def up(
    config: ConfigArgument,
    seed: SeedOption = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: Annotated[str | None, typer.Option(help="Name of the run; an existing one goes on where it stopped.")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Overrides generation.replicas, and what `headrace scale` has ordered of an existing run."),
    ] = None,
    runs_folder: RunsFolderOption = Path("runs"),
) -> None:
    """Run everything on this machine until the run is complete."""
    from redis import RedisError

    from services.launcher.kept import Failed
    from services.launcher.up import up as run_everything

    with _one_line_errors(ConfigError, ValueError, Failed, RedisError):
        number = [] if replicas is None else [f"generation.replicas={replicas}"]
        recipe = _load(config, seed, [*overrides, *number])
        run_everything(recipe, run or _new_name(config), runs_folder, Console(highlight=False), replicas is not None)


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a number that is refused, and no option
def scale(
    order: Annotated[str, typer.Argument(metavar="N|auto", help="Replicas, or auto: no number is ordered any more.")],
    run: Annotated[str | None, typer.Option(help="Name of the run; default: the only one with a launcher.")] = None,
    runs_folder: RunsFolderOption = Path("runs"),
    redis_url: RedisUrlOption = None,
) -> None:
    """Order another number of replicas of a run that `headrace up` is running; 0 pauses generation."""
    from services.launcher.scale import scale as order_replicas

    with _one_line_errors(ValueError):
        print(order_replicas(order, run, runs_folder, redis_url))


@app.command()
def plan(
    run: RunArgument,
    up_to: Annotated[int | None, typer.Option(min=1, help="Replicas; default: generation.max_replicas.")] = None,
    runs_folder: RunsFolderOption = Path("runs"),
) -> None:
    """Simulate a run with other numbers of replicas, from what it has measured; starts and touches nothing."""
    place = ["--run", run, "--runs-folder", str(runs_folder), *([] if up_to is None else ["--up-to", str(up_to)])]
    raise typer.Exit(subprocess.call([sys.executable, "-m", "services.learner.plan", *place]))


@app.command()
def check(config: ConfigArgument, seed: SeedOption = None, overrides: SetOption = []) -> None:  # noqa: B006
    """Validate a recipe without starting anything; print its settings with their sources, and estimates."""
    from services.launcher.check import check_recipe

    with _one_line_errors(ConfigError, ValueError):
        check_recipe(_load(config, seed, overrides), Console(highlight=False))


@app.command()
def audit(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    runs_folder: RunsFolderOption = Path("runs"),
    redis_url: RedisUrlOption = None,
) -> None:
    """Account for every ticket of a run, going on or ended."""
    _call_on_run("services.learner.audit", ["--json"] if as_json else [], run, runs_folder, redis_url)


@app.command()
def record(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="The recording's file.")] = None,
    runs_folder: RunsFolderOption = Path("runs"),
    redis_url: RedisUrlOption = None,
) -> None:
    """Follow a run and write its groups and configuration into a recording that can be trained on again."""
    _call_on_run(RECORD_MODULE, ["--output", str(output)] if output else [], run, runs_folder, redis_url)


@app.command()
def dead(
    action: DeadAction,
    run: RunArgument,
    ids: Annotated[list[str] | None, typer.Argument(help="Of tickets.")] = None,
    runs_folder: RunsFolderOption = Path("runs"),
    redis_url: RedisUrlOption = None,
) -> None:
    """List the tickets that could not be answered, with their reasons; open them again; or delete them."""
    _call_on_run("services.learner.dead", [action, *(ids or [])], run, runs_folder, redis_url)


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="What `headrace record` has written.")],
    config: Annotated[Path | None, typer.Option(help="A recipe; default: the recording's own configuration.")] = None,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    runs_folder: RunsFolderOption = Path("runs"),
) -> None:
    """Train on a recording, without any replica."""
    from services.launcher.replay import replay as train_on_recording

    with _one_line_errors(ConfigError, ValueError):
        recipe = _load(config, None, overrides) if config else None
        code = train_on_recording(recording, recipe, overrides, run or f"replay-{_new_name(recording)}", runs_folder)
    raise typer.Exit(code)


@app.command(
    name="warm-start",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def warm_start(context: typer.Context) -> None:
    """Make the demo's warm-started policy (about five minutes on one core); options: warm-start --help."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "services.learner.warm_start", *context.args]))


def _call_on_run(module: str, arguments: Sequence[str], run: str, runs_folder: Path, redis_url: str | None) -> None:
    from services.launcher.open_run import open_run
    from services.launcher.processes import call_module

    with _one_line_errors(ValueError), open_run(run, runs_folder, redis_url) as opened:
        place = ["--run", run, "--runs-folder", str(runs_folder)]
        ended = ["--ended"] if opened.has_ended and module == RECORD_MODULE else []
        code = call_module(module, [*arguments, *place, *ended], opened.url)
    raise typer.Exit(code)


def _new_name(origin: Path) -> str:
    return f"{origin.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


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
