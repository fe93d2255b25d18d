"""`headrace replay`: trains again on a recording, with a Redis of its own and without any replica."""

from collections.abc import Sequence
from pathlib import Path

from headrace.common.config import Recipe
from headrace.common.preflight.installation import check_installed
from headrace.common.redis.keys import Keys
from headrace.launcher.run.open_run import embedded_redis
from headrace.launcher.run.processes import call_module
from headrace.launcher.run.run_folder import run_lock, write_config, write_url_file


def replay(recording: Path, recipe: Recipe | None, overrides: Sequence[str], run: str, runs_folder: Path) -> int:
    """Returns the learner's exit code; the learner is not restarted. Without a recipe, the recording's own is used."""
    Keys(run)  # refuses a name that cannot be a folder's
    check_installed()
    if not recording.exists():
        raise ValueError(f"{recording}: there is no such recording")
    folder = runs_folder / run
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--replay", str(recording), "--run", run, "--runs-folder", str(runs_folder)]
    with run_lock(folder) as lock, embedded_redis(folder, lock) as url, write_url_file(folder, url):
        if recipe is None:
            arguments += [part for override in overrides for part in ("--set", override)]
        else:
            arguments += ["--config", str(write_config(folder, recipe))]
        return call_module("headrace.learner", arguments, url)
