"""The live runs, and the default run of a command that names none.

A run is live while the presence key of its launcher is in its Redis. A launcher that was killed leaves its URL file
behind, and the port in it may belong to another run by now, so the file alone proves nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from headrace.common.redis.keys import Keys, key_pattern, run_in_key
from headrace.launcher.run.errors import NotRunning
from headrace.launcher.run.redis_server import short_timeout_client
from headrace.launcher.run.run_folder import REDIS_URL_FILE, newest_run, read_url_file

REDIS_TIMEOUT_S = 5.0


def choose_run(run: str | None, runs_folder: Path, redis_url: str | None = None) -> str:
    """The named run, else the only live one, else the newest in the folder. Raises `ValueError` if several are live."""
    if run is not None:
        Keys(run)  # refuses a name that cannot be a folder's
        return run
    found: dict[str, str] = {}
    with suppress(NotRunning):  # the logs can be read without Redis; what needs it will say so
        found = live_runs(runs_folder, redis_url)
    return only_live(name for name in found if (runs_folder / name).is_dir()) or newest_run(runs_folder)


def only_live(names: Iterable[str]) -> str | None:
    """The only name of a live run; None if there is none. Raises `ValueError` if there are several."""
    found = sorted(names)
    if len(found) > 1:
        raise ValueError(f"{len(found)} runs are live ({', '.join(found)}): expected --run")
    return found[0] if found else None


def live_runs(runs_folder: Path, redis_url: str | None, run: str | None = None) -> dict[str, str]:
    """The live runs, or only `run`, of a Redis, else of the folder; each with the URL of its Redis."""
    return _live_in_redis(redis_url, run) if redis_url else _live_in_folder(runs_folder, run)


def _live_in_redis(url: str, run: str | None) -> dict[str, str]:
    """Raises `NotRunning` if the Redis at `url` does not answer."""
    with answering_redis(url) as client:
        if run is not None:
            return {run: url} if client.exists(Keys(run).launcher) else {}
        return {run_in_key(key): url for key in client.scan_iter(match=key_pattern("launcher"), count=1000)}


def _live_in_folder(runs_folder: Path, run: str | None) -> dict[str, str]:
    names = [path.parent.name for path in runs_folder.glob(f"*/{REDIS_URL_FILE}")] if run is None else [run]
    found: dict[str, str] = {}
    for name in names:
        url = read_url_file(runs_folder / name)
        try:
            found |= _live_in_redis(url, name) if url else {}
        except NotRunning:
            continue
    return found


@contextmanager
def answering_redis(url: str) -> Iterator[redis.Redis]:
    """A client. Raises `NotRunning` with one line if Redis does not answer."""
    with short_timeout_client(url, REDIS_TIMEOUT_S) as client:
        try:
            yield client
        except redis.RedisError as error:
            raise NotRunning(f"Redis does not answer: {error}") from error
