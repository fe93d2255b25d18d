"""What a replica needs beyond what every service does that joins a run: a name, and the model's files at hand."""

from pathlib import Path

from headrace.common.bootstrap import Joined
from headrace.common.bootstrap import join as join_run
from headrace.common.models.hub import is_hub_name
from headrace.common.preflight.recipe import model_files
from headrace.common.process.waiting import Waits
from headrace.common.wire.checks import name_problem


def join(redis_url: str, run: str | None, token_file: Path | None, waits: Waits) -> Joined:
    """As `headrace.common.bootstrap.join`; `ValueError` too if the model is not there."""
    joined = join_run(redis_url, run, token_file, waits)
    model = joined.config.model
    if not is_hub_name(model.path):
        model_files(model.location, model.revision)
    return joined


def check_name(name: str) -> None:
    """Raises `ValueError` for what cannot name a replica, its keys and its log."""
    if problem := name_problem(name) or ("has a '/'" if "/" in name else ""):
        raise ValueError(f"the replica's name {problem}")
