"""A run's Redis for one command: of a live run, or started on the files of an ended one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from headrace.common.redis.keys import Keys
from headrace.launcher.run.processes import REDIS_URL_VARIABLE
from headrace.launcher.run.redis_server import is_answering, start_redis
from headrace.launcher.run.run_folder import REDIS_URL_FILE, RunInUse, read_url_file, run_lock

REDIS_GRACE_S = 30.0


class RunRedis(NamedTuple):
    url: str
    has_ended: bool
    """No process of the run is running, so that its Redis content is final."""


@contextmanager
def open_run(run: str, runs_folder: Path, redis_url: str | None) -> Iterator[RunRedis]:
    """The given Redis, else the running launcher's, else a temporary server on the run's append-only file.

    The temporary server and the run's lock last as long as the block. Raises `ValueError` naming what was tried.
    """
    Keys(run)  # refuses a name that cannot be a folder's
    folder = runs_folder / run
    with ExitStack() as stack:
        yield RunRedis(redis_url, False) if redis_url else _find(folder, stack)


def _find(folder: Path, stack: ExitStack) -> RunRedis:
    if not folder.is_dir():
        raise ValueError(f"run {folder.name!r}: there is no folder {folder}")
    try:
        lock = stack.enter_context(run_lock(folder))
    except RunInUse as error:
        noted = read_url_file(folder)
        if noted is None or not is_answering(noted):
            raise ValueError(f"{error}, and no Redis answers at the URL in {folder / REDIS_URL_FILE}") from error
        return RunRedis(noted, has_ended=False)
    if not any(folder.glob("redis/**/appendonly.aof*")):
        raise ValueError(
            f"run {folder.name!r}: no Redis; looked for --redis-url, {REDIS_URL_VARIABLE}, a running launcher of "
            f"{folder}, an append-only file in {folder / 'redis'}"
        )
    return RunRedis(stack.enter_context(embedded_redis(folder, lock)), has_ended=True)


@contextmanager
def embedded_redis(folder: Path, lock: int) -> Iterator[str]:
    """Runs a server on the run's append-only file during the block; yields its URL."""
    service, url = start_redis(folder / "redis", folder / "logs" / "redis.log", lock)
    try:
        yield url
    finally:
        service.stop(REDIS_GRACE_S)
