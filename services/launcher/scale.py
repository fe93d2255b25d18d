"""`headrace scale`: orders a number of replicas of a running launcher, or withdraws the order."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from common.control import DESIRED_REPLICAS, desired_replicas
from common.keys import Keys, of_every_run, run_of
from services.launcher.processes import look_up
from services.launcher.run_folder import REDIS_URL_FILE, noted_url_in

LOOK_TIMEOUT_S = 5.0
WITHDRAWN = "auto"


def scale(order: str, run: str | None, runs_folder: Path, redis_url: str | None) -> str:
    """What to tell. `order`: a number, or `auto`. Raises `ValueError`, and orders nothing, where nobody would obey."""
    number = None if order == WITHDRAWN else desired_replicas(order)
    if run is not None:
        Keys(run)  # a name that is no folder's
    found = _launched_at(redis_url, run) if redis_url else _launched_in(runs_folder, run)
    if len(found) != 1:
        where = "in that Redis" if redis_url else f"in {runs_folder}"
        of = f"run {run!r} has no launcher" if run else "no launcher is running"
        several = f"{len(found)} launchers are running ({', '.join(sorted(found))}): expected --run"
        raise ValueError(
            several if found else f"{of} {where}; headrace up starts one, and replicas elsewhere just join"
        )
    ((name, url),) = found.items()
    with _asked(url) as client:
        if number is None:
            client.hdel(Keys(name).control, DESIRED_REPLICAS)
            return f"run {name}: no number is ordered any more"
        client.hset(Keys(name).control, DESIRED_REPLICAS, number)
    paused = "; at 0 generation is paused, and the learner waits" if number == 0 else ""
    return f"run {name}: {number} replica{'s' * (number != 1)} ordered{paused}"


def _launched_at(url: str, run: str | None) -> dict[str, str]:
    """The runs whose launcher is present in that Redis, with its URL."""
    with _asked(url) as client:
        if run is not None:
            return {run: url} if client.exists(Keys(run).launcher) else {}
        return {run_of(key): url for key in client.scan_iter(match=of_every_run("launcher"), count=1000)}


def _launched_in(runs_folder: Path, run: str | None) -> dict[str, str]:
    """The same, of the runs kept in that folder."""
    names = [path.parent.name for path in runs_folder.glob(f"*/{REDIS_URL_FILE}")] if run is None else [run]
    found: dict[str, str] = {}
    for name in names:
        url = noted_url_in(runs_folder / name)
        try:
            found |= _launched_at(url, name) if url else {}
        except ValueError:  # a launcher that was killed may have left its note
            continue
    return found


@contextmanager
def _asked(url: str) -> Iterator[redis.Redis]:
    """Raises `ValueError` with one line if Redis does not answer."""
    with look_up(url, LOOK_TIMEOUT_S) as client:
        try:
            yield client
        except redis.RedisError as error:
            raise ValueError(f"Redis does not answer: {error}") from error
