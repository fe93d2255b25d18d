"""The control process. Like a replica, it needs only a Redis URL and the token of the run.

    python -m headrace.control --run demo --redis-url redis://127.0.0.1:6379 --token-file runs/demo/token --port 8080

It can stop and start at any time: the run does not depend on it, and all state is in Redis.
Exit codes: 0 stopped on request, 1 failed, 2 refused to start.
"""

import argparse
import asyncio
import json
import logging
import signal
import socket
import sys

import redis

from headrace.common.bootstrap import JoinedRun, join_run, service_parser
from headrace.common.http.addresses import listen_with_overrides, socket_url
from headrace.common.process.logs import set_up_logging
from headrace.common.process.waiting import Waits
from headrace.control.assembly import openapi_document, running_app, serving

_log = logging.getLogger("headrace.control")


def main() -> int:
    arguments = _parse_arguments()
    if arguments.openapi:
        print(json.dumps(openapi_document(), indent=2))
        return 0
    set_up_logging("control")
    try:
        joined = join_run(arguments.redis_url, arguments.run, arguments.token_file, Waits())
        sock = listen_with_overrides(joined.config.control, arguments.host, arguments.port)
    except KeyboardInterrupt:
        return 0
    except (ValueError, TimeoutError, redis.RedisError) as error:
        print(f"headrace control: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(arguments, joined, sock))
    except Exception:  # noqa: BLE001 - the process's top
        _log.exception("control failed")
        return 1
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = service_parser("control")
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document and exit")
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace, joined: JoinedRun, sock: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop_requested, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_requested.set)
    run = joined.keys.run
    parts = running_app(
        run, joined.config, arguments.redis_url, joined.token, joined.config.control.require_token_for_reads
    )
    async with parts as (app, monitor), serving(app, monitor, sock):
        _log.info("run %s at %s", run, socket_url(sock))
        await stop_requested.wait()


if __name__ == "__main__":
    sys.exit(main())
