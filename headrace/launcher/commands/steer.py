"""Orders to a run that is going on: each goes to its control service, stands until obeyed, and says what follows."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from headrace.common.config import yaml_text
from headrace.launcher.commands.options import (
    RUNS,
    STEER,
    JsonOption,
    OneRunOption,
    RedisUrlOption,
    RunsFolderOption,
    UrlOption,
    one_line_errors,
    print_json,
)
from headrace.launcher.commands.scale import scale as order_replicas
from headrace.launcher.run.control_client import Control, find_control

app = typer.Typer()
panel = STEER
WITHDRAWN_SETTING = "default"


@app.command(rich_help_panel=panel, context_settings={"ignore_unknown_options": True})  # -1 is a number, and refused
def scale(
    order: Annotated[str, typer.Argument(metavar="N|auto", help="Replicas, or auto: no number is ordered any more.")],
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
    redis_url: RedisUrlOption = None,
) -> None:
    """Order another number of replicas of a run that `headrace up` is running; 0 pauses generation."""
    with one_line_errors():
        ordered = order_replicas(order, run, runs_folder, redis_url, url)
        print_json(ordered._asdict()) if as_json else print(ordered.text)


def _add_order(name: str, text: str) -> None:
    """A command that needs nothing but the run."""

    @app.command(name, help=text, rich_help_panel=panel)
    def order(
        run: OneRunOption = None,
        url: UrlOption = None,
        as_json: JsonOption = False,
        runs_folder: RunsFolderOption = RUNS,
    ) -> None:
        _order(f"/{name}", run, url, runs_folder, as_json)


_add_order("pause", "No steps and no tickets, after the step in progress, until resumed.")
_add_order("resume", "Steps and tickets go on.")
_add_order("checkpoint", "A checkpoint after the step in progress.")
_add_order("stop", "End the run after the step in progress, with a checkpoint; `headrace up` goes on from there.")


@app.command(rich_help_panel=panel)
def drain(
    replica: Annotated[str, typer.Argument(help="Its name, as `headrace replicas` lists it.")],
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """A replica finishes or hands back its tickets, then ends; a launcher starts another unless fewer are ordered."""
    _order(f"/replicas/{quote(replica, safe='')}/drain", run, url, runs_folder, as_json)


@app.command(rich_help_panel=panel)
def settings(
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="VALUE default: as configured again.")
    ] = None,
    run: OneRunOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
    runs_folder: RunsFolderOption = RUNS,
) -> None:
    """Show the settings that can change while a run goes on, or change them, from the learner's next step."""
    with one_line_errors():
        wanted = dict(map(_change, changes or []))
        control = find_control(run, url, runs_folder)
        answer = control.get("/settings")
        if wanted:
            answer = control.order("PATCH", "/settings", {"version": answer["version"], "settings": wanted})
        print_json(answer) if as_json else _print_settings(answer)


def _order(path: str, run: str | None, url: str | None, runs_folder: Any, as_json: bool) -> None:
    with one_line_errors():
        control: Control = find_control(run, url, runs_folder)
        answer = control.order("POST", path)
        if as_json:
            print_json(answer)
        else:
            name = (answer.get("status") or {}).get("run") or run or control.url
            print(f"run {name}: {answer['text']}")


def _change(text: str) -> tuple[str, int | float | None]:
    name, equals, given = text.partition("=")
    try:
        number = None if given.strip() in (WITHDRAWN_SETTING, "null") else yaml_text.load(given)
    except ValueError:
        number = given
    is_number = number is None or (isinstance(number, int | float) and not isinstance(number, bool))
    if not equals or not name.strip() or not is_number or not given.strip():
        raise ValueError(f"{text!r}: expected section.name=number, or section.name={WITHDRAWN_SETTING}")
    return name.strip(), number


def _print_settings(answer: dict[str, Any]) -> None:
    width = max(map(len, answer["settings"]), default=0)
    for name, setting in answer["settings"].items():
        changed = "" if setting["value"] == setting["configured"] else f"configured {_shown(setting['configured'])}"
        print(f"{name:{width}}  {_shown(setting['value']):>10}  {changed:20}  {setting['description']}".rstrip())
    state = "as configured" if not answer["version"] else f"version {answer['version']}"
    waits = "" if answer["applied_version"] == answer["version"] else ", the learner takes it up with its next step"
    print(f"{state}{waits}")


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}"
