"""`headrace scale`: sets the number of replicas that a running launcher keeps, or clears it.

The command goes through the run's control service where that answers, so that the page and the events show it. Else it
writes to Redis itself.
"""

from pathlib import Path
from typing import Any, NamedTuple

from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import DESIRED_REPLICAS, parse_desired_replicas, parse_launcher
from headrace.launcher.run.control_client import find_control
from headrace.launcher.run.errors import ControlFailed, NotRunning
from headrace.launcher.run.live_runs import answering_redis, live_runs, only_live


class Scaled(NamedTuple):
    run: str
    replicas: int | None
    """None: the target was cleared."""
    text: str


def scale(target: str | None, run: str | None, runs_folder: Path, redis_url: str | None, url: str | None) -> Scaled:
    """Sets the target, or clears it where `target` is None.

    Raises `NotRunning`, and changes nothing, where no launcher would follow, and `ValueError` for an invalid number.
    """
    number = None if target is None else parse_desired_replicas(target)
    if run is not None:
        Keys(run)  # refuses a name that cannot be a folder's
    name = None if redis_url and not url else _through_control(number, run, runs_folder, url)
    return _scaled(name or _in_redis(number, run, runs_folder, redis_url), number)


def _scaled(run: str, number: int | None) -> Scaled:
    if number is None:
        return Scaled(run, None, f"run {run}: target cleared; the configured number applies, or the learner's advice")
    paused = "; at 0 generation is paused, and the learner waits" if number == 0 else ""
    return Scaled(run, number, f"run {run}: target set to {number} replica{'s' * (number != 1)}{paused}")


def _through_control(number: int | None, run: str | None, runs_folder: Path, url: str | None) -> str | None:
    """The run's name; None if no control service answers where none was named."""
    try:
        control = find_control(run, url, runs_folder)
        name = control.run()
        control.send("PUT", "/replicas/desired", {"replicas": number})
    except (NotRunning, ControlFailed):
        if url:
            raise
        return None
    return name


def _in_redis(number: int | None, run: str | None, runs_folder: Path, redis_url: str | None) -> str:
    found = live_runs(runs_folder, redis_url, run)
    name = only_live(found)
    if name is None:
        where = "in that Redis" if redis_url else f"in {runs_folder}"
        problem = f"run {run!r} has no launcher" if run else "no launcher is running"
        raise NotRunning(f"{problem} {where}; headrace up starts one, and replicas elsewhere join by themselves")
    with answering_redis(found[name]) as client:
        if number is None:
            client.hdel(Keys(name).control, DESIRED_REPLICAS)
        else:
            presence: Any = client.get(Keys(name).launcher)
            parse_launcher((presence or b"").decode(errors="replace")).check_capacity(number)
            client.hset(Keys(name).control, DESIRED_REPLICAS, number)
    return name
