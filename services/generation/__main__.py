"""A replica's process. It needs a Redis URL, a run and the run's token; everything else it reads from the run.

    HEADRACE_REDIS_URL=redis://127.0.0.1:6379 python -m services.generation --run demo --token-file runs/demo/token

SIGTERM and SIGINT drain it: it has ended, with all its processes, `EXIT_DEADLINE_S` seconds later at the latest.
Exit codes: 0 drained, 1 failed, 2 refused before anything started.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import redis
from pydantic import ValidationError

from common.config import ConfigError, RunConfig
from common.http_service import TOKEN_VARIABLE, Server, listen, url_of
from common.keys import Keys
from common.logs import set_up_logging
from common.preflight import check_engine_installed
from common.redis_client import connect
from common.waiting import Reason, Waits
from services.generation.api import make_app
from services.generation.assembly import assembled
from services.generation.loop import Replica

RUN_TIMEOUT_S = 600.0
POLL_S = 0.5
EXIT_DEADLINE_S = 9.0
_log = logging.getLogger("services.generation")
Found = TypeVar("Found")


def main() -> int:
    arguments, waits = _parse_arguments(), Waits()
    set_up_logging(f"generation {arguments.name}")
    try:
        config = _wait_for_config(arguments, waits)
        token = _wait_for_token(arguments, waits)
        sock = listen(
            config.generation.host if arguments.host is None else arguments.host,
            config.generation.port if arguments.port is None else arguments.port,
        )
        if config.generation.engine.url is None:
            check_engine_installed()
    except KeyboardInterrupt:
        return 0
    except (ConfigError, ValueError, TimeoutError, redis.RedisError) as error:
        print(f"headrace generation: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(arguments, config, token, sock, waits))
    except asyncio.CancelledError:
        pass  # asked to end before there was anything to drain
    except Exception:  # noqa: BLE001 - the process's top
        _log.exception("the replica failed")
        return 1
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.generation")
    parser.add_argument("--run", default=os.environ.get("HEADRACE_RUN", "demo"))
    parser.add_argument(
        "--redis-url",
        default=os.environ.get("HEADRACE_REDIS_URL", "redis://127.0.0.1:6379"),
        help="better given as HEADRACE_REDIS_URL where it has a password: a command line is for everybody to see",
    )
    parser.add_argument("--token-file", type=Path, default=None, help=f"unless the variable {TOKEN_VARIABLE} is set")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="of the replica")
    parser.add_argument("--log-folder", type=Path, default=Path("runs/logs"), help="for the engine's log")
    parser.add_argument("--host", default=None, help="overrides generation.host")
    parser.add_argument("--port", type=int, default=None, help="overrides generation.port")
    return parser.parse_args()


def _wait_for_config(arguments: argparse.Namespace, waits: Waits) -> RunConfig:
    """The learner puts it into Redis as its first act."""
    key = Keys(arguments.run).config
    with connect(arguments.redis_url, waits, deadline_s=RUN_TIMEOUT_S) as client:
        what = f"run {arguments.run!r} has no configuration in Redis: no learner has begun it"
        found = _wait_for(lambda: client.get(key), what, waits)
    try:
        return RunConfig.model_validate_json(found)
    except ValidationError as error:  # whose own text repeats what it was given, which may be secret
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"the configuration of run {arguments.run!r} in Redis: {problems}") from None


def _wait_for_token(arguments: argparse.Namespace, waits: Waits) -> str:
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    path: Path | None = arguments.token_file
    if path is None:
        raise ValueError(f"no token: expected the variable {TOKEN_VARIABLE} or --token-file")
    return _wait_for(lambda: path.read_text().strip() if path.exists() else "", f"no token in {path}", waits)


def _wait_for(look: Callable[[], Found], what: str, waits: Waits) -> Found:
    """The first look that finds something; raises `TimeoutError` after `RUN_TIMEOUT_S`."""
    while not (found := look()):
        if waits.waiting(Reason.NO_TICKETS, what, RUN_TIMEOUT_S) > RUN_TIMEOUT_S:
            raise TimeoutError(f"{what} within {RUN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    waits.over(Reason.NO_TICKETS)
    return found


async def _serve(
    arguments: argparse.Namespace, config: RunConfig, token: str, sock: socket.socket, waits: Waits
) -> None:
    task, keys, url = asyncio.current_task(), Keys(arguments.run), url_of(sock)
    assert task is not None
    _on_signals(task.cancel)
    try:
        parts = assembled(config, keys, arguments.redis_url, token, arguments.name, url, arguments.log_folder, waits)
        async with parts as replica, _http(replica, token, sock):
            _on_signals(replica.drain)
            await replica.serve()
    finally:
        _end_in_time()  # a thread of a library may go on


def _on_signals(end: Callable[[], object]) -> None:
    """Not asyncio's own handlers: these hear nothing while the loop is blocked."""
    loop = asyncio.get_running_loop()

    def receive(*_: object) -> None:
        _end_in_time()
        loop.call_soon_threadsafe(end)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)


def _end_in_time() -> None:
    """The process ends within `EXIT_DEADLINE_S`, whatever hangs; the engine and the reward workers die with it."""

    def give_up() -> None:
        _log.error("not ended within %g s of being asked to: exiting now", EXIT_DEADLINE_S)
        os._exit(1)

    timer = threading.Timer(EXIT_DEADLINE_S, give_up)
    timer.daemon = True
    timer.start()


@contextlib.asynccontextmanager
async def _http(replica: Replica, token: str, sock: socket.socket) -> AsyncIterator[None]:
    server = Server(make_app(replica, token))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


if __name__ == "__main__":
    sys.exit(main())
