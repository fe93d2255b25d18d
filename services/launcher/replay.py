"""`headrace replay`: trains again on a recording, with a Redis of its own and without any replica."""

from collections.abc import Sequence
from pathlib import Path

from common.config import Recipe
from common.keys import Keys
from services.launcher.open_run import embedded_redis
from services.launcher.processes import call_module
from services.launcher.run_folder import locked, noted_url, write_config


def replay(recording: Path, recipe: Recipe | None, overrides: Sequence[str], run: str, runs_folder: Path) -> int:
    """The exit code of the learner's side; nothing is started again. Without a recipe the recording carries it."""
    Keys(run)  # a name that is no folder's
    if not recording.exists():
        raise ValueError(f"{recording}: there is no such recording")
    folder = runs_folder / run
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--replay", str(recording), "--run", run, "--runs-folder", str(runs_folder)]
    with locked(folder) as lock, embedded_redis(folder, lock) as url, noted_url(folder, url):
        if recipe is None:
            arguments += [part for override in overrides for part in ("--set", override)]
        else:
            arguments += ["--config", str(write_config(folder, recipe))]
        return call_module("services.learner", arguments, url)
