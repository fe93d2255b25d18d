"""Commands to a live run: each is sent to its control service and stays in force until it is carried out."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from headrace.launcher.commands.options import (
    RUNS,
    STEER,
    JsonOption,
    RedisUrlOption,
    RunOption,
    RunsFolderOption,
    UrlOption,
    control_of,
    one_line_errors,
    print_json,
)

app = typer.Typer()


@app.command(rich_help_panel=STEER, context_settings={"ignore_unknown_options": True})  # -1 is a number, and refused
def scale(
    replicas: Annotated[
        str | None, typer.Argument(metavar="[N]", help="Number of replicas to keep; 0 pauses generation.")
    ] = None,
    clear: Annotated[
        bool,
        typer.Option(
            "--clear",
            help="Clear the target: the configured number applies, or the learner's advice with generation.autoscale.",
        ),
    ] = False,
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Set the number of replicas of a live run that `headrace up` started, or clear it."""
    from headrace.launcher.commands.scale import scale as set_target

    with one_line_errors():
        if (replicas is None) != clear:
            raise ValueError(f"replicas {replicas!r}, --clear {clear}: expected either a number or --clear")
        scaled = set_target(replicas, run, runs_folder, redis_url, url)
        print_json(scaled._asdict()) if as_json else print(scaled.text)


def _add_command(name: str, text: str) -> None:
    """A command that needs nothing but the run."""

    @app.command(name, help=text, rich_help_panel=STEER)
    def command(
        run: RunOption = None,
        url: UrlOption = None,
        as_json: JsonOption = False,
        runs_folder: RunsFolderOption = RUNS,
    ) -> None:
        _send(f"/{name}", run, url, runs_folder, as_json)


_add_command("pause", "Pause the run after the step in progress: no steps and no tickets until `headrace resume`.")
_add_command("resume", "Resume a paused run.")
_add_command("checkpoint", "Write a checkpoint after the step in progress.")
_add_command("stop", "End the run after the step in progress, with a checkpoint; `headrace up` continues it.")


@app.command(rich_help_panel=STEER)
def drain(
    replica: Annotated[str, typer.Argument(help="Name of the replica, as `headrace replicas` lists it.")],
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """End a replica after it has finished its tickets or handed them back; the launcher replaces it if necessary."""
    _send(f"/replicas/{quote(replica, safe='')}/drain", run, url, runs_folder, as_json)


@app.command(rich_help_panel=STEER)
def settings(
    changes: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Settings to change.")] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option("--reset", metavar="NAME", help="Setting to set back to its configured value; may be repeated."),
    ] = None,
    run: RunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Show the settings that can change while a run is live, or change them from the learner's next step on."""
    from headrace.launcher.run.control_client import find_control

    with one_line_errors():
        wanted: dict[str, int | float | None] = dict(map(_parse_change, changes or []))
        if both := sorted(wanted.keys() & set(reset or [])):
            raise ValueError(f"{both[0]}: expected either a new value or --reset")
        wanted |= dict.fromkeys(reset or [])
        control = find_control(run, url, runs_folder)
        answer = control.get("/settings")
        if wanted:
            answer = control.send("PATCH", "/settings", {"version": answer["version"], "settings": wanted})
        print_json(answer) if as_json else _print_settings(answer)


def _send(path: str, run: str | None, url: str | None, runs_folder: Path, as_json: bool) -> None:
    with control_of(run, url, runs_folder) as control:
        answer = control.send("POST", path)
        if as_json:
            print_json(answer)
        else:
            name = (answer.get("status") or {}).get("run") or run or control.url
            print(f"run {name}: {answer['text']}")


def _parse_change(text: str) -> tuple[str, int | float]:
    """The setting's name and new value. Raises `ValueError`."""
    from headrace.common.config import yaml_text

    name, equals, given = text.partition("=")
    try:
        number = yaml_text.load(given)
    except ValueError:
        number = given
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not equals or not name.strip() or not is_number:
        raise ValueError(f"{text!r}: expected section.name=number, or --reset section.name")
    return name.strip(), number


def _print_settings(answer: dict[str, Any]) -> None:
    width = max(map(len, answer["settings"]), default=0)
    for name, setting in answer["settings"].items():
        changed = "" if setting["value"] == setting["configured"] else f"configured {_shown(setting['configured'])}"
        print(f"{name:{width}}  {_shown(setting['value']):>10}  {changed:20}  {setting['description']}".rstrip())
    state = "as configured" if not answer["version"] else f"version {answer['version']}"
    pending = "" if answer["applied_version"] == answer["version"] else ", applied from the learner's next step on"
    print(f"{state}{pending}")


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}"
