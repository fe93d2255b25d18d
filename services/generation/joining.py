"""What a replica needs beyond what every service does that joins a run: a name, and the model's files at hand."""

from pathlib import Path

from common.hub import is_hub_name
from common.joining import Joined
from common.joining import join as join_run
from common.preflight import model_files
from common.waiting import Waits
from common.wire_checks import name_problem


def join(redis_url: str, run: str | None, token_file: Path | None, waits: Waits) -> Joined:
    """As `common.joining.join`; `ValueError` too if the model is not there."""
    joined = join_run(redis_url, run, token_file, waits)
    model = joined.config.model
    if not is_hub_name(model.path):
        model_files(model.path, model.revision)
    return joined


def check_name(name: str) -> None:
    """Raises `ValueError` for what cannot name a replica, its keys and its log."""
    if problem := name_problem(name) or ("has a '/'" if "/" in name else ""):
        raise ValueError(f"the replica's name {problem}")
