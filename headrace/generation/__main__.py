"""A replica's process. It needs a Redis URL and the run's token, and reads everything else from the run.

    HEADRACE_REDIS_URL=redis://10.0.0.1:6379 HEADRACE_TOKEN=... python -m headrace.generation

SIGTERM drains it: episodes have `environment.drain_s` to end. SIGINT, or a second signal, gives them no time. It and
all its processes end within `EXIT_DEADLINE_S` seconds after that.
Exit codes: 0 drained, 1 failed, 2 refused before anything started.
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import redis

from headrace.common.bootstrap import JoinedRun, service_parser
from headrace.common.http.addresses import listen_with_overrides, socket_url
from headrace.common.http.service import serve_in_loop
from headrace.common.preflight.recipe import check_engine_installed
from headrace.common.process.logs import set_up_logging
from headrace.common.process.waiting import Waits
from headrace.common.wire import one_line
from headrace.generation.assembly import assemble_replica
from headrace.generation.bootstrap import check_name, join
from headrace.generation.http_api import make_app
from headrace.generation.weights.free_space import InsufficientSpace
from headrace.generation.workers.process import TaskError

EXIT_DEADLINE_S = 9.0
_log = logging.getLogger("headrace.generation")


def main() -> int:
    arguments, waits = _parse_arguments(), Waits()
    set_up_logging("generation", replica=arguments.name)
    try:
        check_name(arguments.name)
        joined = join(arguments.redis_url, arguments.run, arguments.token_file, waits)
        sock = listen_with_overrides(joined.config.generation, arguments.host, arguments.port)
        if joined.config.generation.engine.url is None:
            check_engine_installed()
    except KeyboardInterrupt:
        return 0
    except (ValueError, TimeoutError, redis.RedisError) as error:
        print(f"headrace generation: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(arguments, joined, sock, waits))
    except asyncio.CancelledError:
        pass  # a signal came before the replica was assembled
    except Exception as error:  # noqa: BLE001 - the process's top
        reason = _innermost(error)
        if isinstance(reason, InsufficientSpace | TaskError):
            print(f"headrace generation: {one_line(str(reason))}", file=sys.stderr)
            return 2
        _log.exception("the replica failed: %s", f"{type(reason).__name__}: {reason}")
        return 1
    return 0


def _innermost(error: Exception) -> Exception:
    """The first exception of nested exception groups."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _parse_arguments() -> argparse.Namespace:
    parser = service_parser("generation")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{secrets.token_hex(4)}", help="name of the replica")
    parser.add_argument("--log-folder", type=Path, default=Path("runs/logs"), help="folder for the engine's log")
    parser.add_argument(
        "--shares-gpu",
        action="store_true",
        help="the engine gets what learner.memory_fraction leaves of the GPU",
    )
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace, joined: JoinedRun, sock: socket.socket, waits: Waits) -> None:
    task, url = asyncio.current_task(), socket_url(sock)
    assert task is not None
    _on_signals(lambda _: task.cancel())
    try:
        name, log_folder = arguments.name, arguments.log_folder
        run = (joined.config, joined.keys, arguments.redis_url, joined.token)
        assembling = assemble_replica(*run, name, url, log_folder, waits, joined.has_rollout, arguments.shares_gpu)
        async with assembling as replica, serve_in_loop(make_app(replica, joined.token), sock):
            _on_signals(replica.drain, replica.rollouts.drain_s)
            await replica.serve()
    finally:
        _exit_by_deadline()  # a library's thread may keep the process alive


def _on_signals(end: Callable[[bool], object], drain_s: float = 0.0) -> None:
    """Calls `end` in the event loop, with whether it is to hurry. asyncio's own handlers are not used: they do not run
    while the loop is blocked."""
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        is_hurried = number == signal.SIGINT or bool(received)
        received.append(number)
        _exit_by_deadline(0.0 if is_hurried else drain_s)
        loop.call_soon_threadsafe(end, is_hurried)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)


def _exit_by_deadline(drain_s: float = 0.0) -> None:
    """Ends the process after `drain_s` and `EXIT_DEADLINE_S` if it hangs; the engine and the workers die with it."""
    deadline_s = drain_s + EXIT_DEADLINE_S

    def give_up() -> None:
        _log.error("the replica has not ended within %g s of the request; exiting now", deadline_s)
        os._exit(1)

    timer = threading.Timer(deadline_s, give_up)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
