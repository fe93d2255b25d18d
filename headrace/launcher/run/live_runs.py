"""Which runs are live, and which run a command means when it names none.

A run is live while the presence key of its launcher is in its Redis. A launcher that was killed leaves its URL file
behind, and the port in it may belong to another run by now, so the file alone proves nothing.
"""

from collections.abc import Iterator
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
        found = launched_at(redis_url, None) if redis_url else launched_in(runs_folder, None)
    live = [name for name in found if (runs_folder / name).is_dir()]
    if len(live) > 1:
        raise ValueError(f"{len(live)} runs are live ({', '.join(sorted(live))}): expected --run")
    return next(iter(live), None) or newest_run(runs_folder)


def launched_at(url: str, run: str | None) -> dict[str, str]:
    """The runs, or only `run`, whose launcher is present in the Redis at `url`, with that URL. Raises `NotRunning`."""
    with answering_redis(url) as client:
        if run is not None:
            return {run: url} if client.exists(Keys(run).launcher) else {}
        return {run_in_key(key): url for key in client.scan_iter(match=key_pattern("launcher"), count=1000)}


def launched_in(runs_folder: Path, run: str | None) -> dict[str, str]:
    """The runs of the folder, or only `run`, whose launcher is present, with the URL of their Redis."""
    names = [path.parent.name for path in runs_folder.glob(f"*/{REDIS_URL_FILE}")] if run is None else [run]
    found: dict[str, str] = {}
    for name in names:
        url = read_url_file(runs_folder / name)
        try:
            found |= launched_at(url, name) if url else {}
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
