"""How a service joins a run: it finds the run's name, configuration and token.

A Redis URL and the token suffice: a name is needed only if Redis has several runs, and the configuration is in Redis.
The service waits for what may still appear (the learner that begins the run, the token file). Invalid input raises
`ValueError` with one line.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import redis
from pydantic import ValidationError

from headrace.common.config import ConfigError, RunConfig
from headrace.common.process.logs import add_process_fields
from headrace.common.process.run_token import TOKEN_VARIABLE, read_token_file, token_from_environment
from headrace.common.process.waiting import Reason, Waits
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys, key_pattern, run_in_key

JOIN_TIMEOUT_S = 600.0
POLL_S = 0.5
Found = TypeVar("Found")


class JoinedRun(NamedTuple):
    """The run that a service has joined."""

    keys: Keys
    config: RunConfig
    token: str
    has_rollout: bool
    """The task has `rollout` in place of `reward`, as the learner has found."""


def service_parser(service: str) -> argparse.ArgumentParser:
    """The parser for a service that joins a run: the arguments of `join_run`, and the address to listen on."""
    parser = argparse.ArgumentParser(prog=f"python -m headrace.{service}")
    parser.add_argument(
        "--run", default=os.environ.get("HEADRACE_RUN"), help="name of the run; default: the only one in this Redis"
    )
    parser.add_argument(
        "--redis-url",
        default=os.environ.get("HEADRACE_REDIS_URL", ""),
        help="URL of the run's Redis; if it has a password, use HEADRACE_REDIS_URL: other users can see command lines",
    )
    parser.add_argument(
        "--token-file", type=Path, default=None, help=f"file with the run's token; not read if {TOKEN_VARIABLE} is set"
    )
    parser.add_argument("--host", default=None, help=f"address to listen on; overrides {service}.host")
    parser.add_argument("--port", type=int, default=None, help=f"port to listen on; overrides {service}.port")
    return parser


def join_run(redis_url: str, run: str | None, token_file: Path | None, waits: Waits) -> JoinedRun:
    """Waits up to `JOIN_TIMEOUT_S` for each part, then raises `TimeoutError`; `ValueError` for invalid input."""
    if not redis_url:
        raise ValueError("no Redis: expected the variable HEADRACE_REDIS_URL or --redis-url")
    token = token_from_environment()
    if token is None and token_file is None:
        raise ValueError(f"no token: expected the variable {TOKEN_VARIABLE} or --token-file")
    with connect(redis_url, waits, deadline_s=JOIN_TIMEOUT_S) as client:
        keys = Keys(run) if run else _wait_for(lambda: _only_run(client), "no learner has begun any run", waits)
        what = f"run {run!r} has no configuration in Redis: no learner has begun it"
        config = _read_config(_wait_for(lambda: client.get(keys.config), what, waits))
        has_rollout = client.get(keys.task_method) == b"rollout"
    if token is None:
        assert token_file is not None
        token = _wait_for(lambda: read_token_file(token_file), f"no token in {token_file}", waits)
    add_process_fields(run=keys.run)
    return JoinedRun(keys, config, token, has_rollout)


def _only_run(client: redis.Redis) -> Keys | None:
    runs = sorted(run_in_key(key) for key in client.scan_iter(match=key_pattern("config"), count=1000))
    if len(runs) > 1:
        shown = ", ".join(runs[:5]) + ", …" * (len(runs) > 5)
        raise ValueError(f"this Redis has {len(runs)} runs ({shown}): expected HEADRACE_RUN or --run")
    return Keys(runs[0]) if runs else None


def _read_config(found: bytes) -> RunConfig:
    try:
        return RunConfig.model_validate_json(found)
    except ValidationError as error:  # its own text repeats the values, which may be secret
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"the run's configuration in Redis: {problems}") from None


def _wait_for(find: Callable[[], Found | None], what: str, waits: Waits) -> Found:
    """Calls `find` until it returns a value; raises `TimeoutError` after `JOIN_TIMEOUT_S`."""
    while not (found := find()):
        if waits.note(Reason.NO_TICKETS, what, JOIN_TIMEOUT_S) > JOIN_TIMEOUT_S:
            raise TimeoutError(f"{what} within {JOIN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    waits.end(Reason.NO_TICKETS)
    return found
