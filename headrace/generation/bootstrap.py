"""Joins a replica to a run: checks its name, and that the model's files are available on this machine."""

from pathlib import Path

from headrace.common.bootstrap import JoinedRun, join_run
from headrace.common.models.hub import is_hub_name
from headrace.common.preflight.recipe import model_files
from headrace.common.process.waiting import Waits
from headrace.common.wire.checks import name_problem


def join(redis_url: str, run: str | None, token_file: Path | None, waits: Waits) -> JoinedRun:
    """As `headrace.common.bootstrap.join`; also raises `ValueError` if the model's folder does not exist here."""
    joined = join_run(redis_url, run, token_file, waits)
    model = joined.config.model
    if not is_hub_name(model.path):
        model_files(model.location, model.revision)
    return joined


def check_name(name: str) -> None:
    """Raises `ValueError` for a name that cannot be part of a Redis key and of the log's file name."""
    if problem := name_problem(name) or ("has a '/'" if "/" in name else ""):
        raise ValueError(f"the replica's name {problem}")
