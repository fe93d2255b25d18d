"""`headrace scale`: orders a number of replicas of a running launcher, or withdraws the order.

Through the run's control service where it answers, so that the order is told to whoever watches; else in Redis itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

from headrace.common.redis.keys import Keys, of_every_run, run_of
from headrace.common.wire.desired_state import DESIRED_REPLICAS, desired_replicas, parse_launcher
from headrace.launcher.run.control_client import ControlFailed, NotRunning, find_control
from headrace.launcher.run.processes import short_timeout_client
from headrace.launcher.run.run_folder import REDIS_URL_FILE, read_url_file

LOOK_TIMEOUT_S = 5.0
WITHDRAWN = "auto"


class Ordered(NamedTuple):
    run: str
    replicas: int | None
    text: str


def scale(order: str, run: str | None, runs_folder: Path, redis_url: str | None, url: str | None) -> Ordered:
    """`order`: a number, or `auto`. Raises `NotRunning`, and orders nothing, where nobody would obey, and `ValueError`
    for what is no order."""
    number = None if order == WITHDRAWN else desired_replicas(order)
    if run is not None:
        Keys(run)  # a name that is no folder's
    name = None if redis_url and not url else _through_control(number, run, runs_folder, url)
    return _told(name or _in_redis(number, run, runs_folder, redis_url), number)


def _told(run: str, number: int | None) -> Ordered:
    if number is None:
        return Ordered(run, None, f"run {run}: no number is ordered any more")
    paused = "; at 0 generation is paused, and the learner waits" if number == 0 else ""
    return Ordered(run, number, f"run {run}: {number} replica{'s' * (number != 1)} ordered{paused}")


def _through_control(number: int | None, run: str | None, runs_folder: Path, url: str | None) -> str | None:
    """The run's name; None if no control service answers where none was named."""
    try:
        control = find_control(run, url, runs_folder)
        name = control.run()
        control.order("PUT", "/replicas/desired", {"replicas": number})
    except (NotRunning, ControlFailed):
        if url:
            raise
        return None
    return name


def _in_redis(number: int | None, run: str | None, runs_folder: Path, redis_url: str | None) -> str:
    found = _launched_at(redis_url, run) if redis_url else _launched_in(runs_folder, run)
    if len(found) > 1:
        raise ValueError(f"{len(found)} launchers are running ({', '.join(sorted(found))}): expected --run")
    if not found:
        where = "in that Redis" if redis_url else f"in {runs_folder}"
        of = f"run {run!r} has no launcher" if run else "no launcher is running"
        raise NotRunning(f"{of} {where}; headrace up starts one, and replicas elsewhere just join")
    ((name, url),) = found.items()
    with _asked(url) as client:
        if number is None:
            client.hdel(Keys(name).control, DESIRED_REPLICAS)
        else:
            presence: Any = client.get(Keys(name).launcher)
            parse_launcher((presence or b"").decode(errors="replace")).refuse(number)
            client.hset(Keys(name).control, DESIRED_REPLICAS, number)
    return name


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
        url = read_url_file(runs_folder / name)
        try:
            found |= _launched_at(url, name) if url else {}
        except NotRunning:  # a launcher that was killed may have left its note
            continue
    return found


@contextmanager
def _asked(url: str) -> Iterator[redis.Redis]:
    """Raises `NotRunning` with one line if Redis does not answer."""
    with short_timeout_client(url, LOOK_TIMEOUT_S) as client:
        try:
            yield client
        except redis.RedisError as error:
            raise NotRunning(f"Redis does not answer: {error}") from error
