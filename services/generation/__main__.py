"""A replica's process. It needs a Redis URL, a run and the run's token; everything else it reads from the run.

    python -m services.generation --run demo --redis-url redis://127.0.0.1:6379 --token-file runs/demo/token

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
import time
from collections.abc import AsyncIterator
from pathlib import Path

from common.config import ConfigError, RunConfig
from common.http_service import TOKEN_VARIABLE, Server, listen, url_of
from common.keys import Keys
from common.logs import set_up_logging
from common.preflight import check_engine_installed
from common.redis_client import connect, connect_async
from services.generation.api import make_app
from services.generation.engine import Engine, SwapTimings
from services.generation.engine_server import EngineServer
from services.generation.loop import Replica
from services.generation.reward_pool import RewardPool
from services.generation.tickets import TicketStore
from services.generation.weights import WeightFollower, local_model_folder

RUN_TIMEOUT_S = 600.0
POLL_S = 0.5
_log = logging.getLogger("services.generation")


def main() -> int:
    arguments = _parse_arguments()
    set_up_logging(f"generation {arguments.name}")
    try:
        config = _wait_for_config(arguments)
        token = _wait_for_token(arguments)
        sock = listen(
            config.generation.host if arguments.host is None else arguments.host,
            config.generation.port if arguments.port is None else arguments.port,
        )
        if config.generation.engine.url is None:
            check_engine_installed()
    except (ConfigError, ValueError, TimeoutError) as error:
        print(f"headrace generation: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(arguments, config, token, sock))
    except Exception:  # noqa: BLE001 - the process's top
        _log.exception("the replica failed")
        return 1
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.generation")
    parser.add_argument("--run", default=os.environ.get("HEADRACE_RUN", "demo"))
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL", "redis://127.0.0.1:6379"))
    parser.add_argument("--token-file", type=Path, default=None, help=f"unless the variable {TOKEN_VARIABLE} is set")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="of the replica")
    parser.add_argument("--log-folder", type=Path, default=Path("runs/logs"), help="for the engine's log")
    parser.add_argument("--host", default=None, help="overrides generation.host")
    parser.add_argument("--port", type=int, default=None, help="overrides generation.port")
    return parser.parse_args()


def _wait_for_config(arguments: argparse.Namespace) -> RunConfig:
    """The learner puts it into Redis as its first act."""
    client, key = connect(arguments.redis_url), Keys(arguments.run).config
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while (found := client.get(key)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"run {arguments.run!r} has no learner: no configuration in Redis for {RUN_TIMEOUT_S:.0f} s"
            )
        time.sleep(POLL_S)
    return RunConfig.model_validate_json(found)


def _wait_for_token(arguments: argparse.Namespace) -> str:
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    path, deadline = arguments.token_file, time.monotonic() + RUN_TIMEOUT_S
    if path is None:
        raise ValueError(f"no token: expected the variable {TOKEN_VARIABLE} or --token-file")
    while not path.exists() or not path.read_text().strip():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no token in {path} for {RUN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    return str(path.read_text().strip())


async def _serve(arguments: argparse.Namespace, config: RunConfig, token: str, sock: socket.socket) -> None:
    settings, keys = config.generation, Keys(arguments.run)
    async with contextlib.AsyncExitStack() as stack:
        client = connect_async(arguments.redis_url)
        stack.push_async_callback(client.aclose)
        tickets = TicketStore(client, keys, arguments.name)
        await tickets.open()
        rewards = RewardPool(
            config.task.name,
            config.task.settings,
            num_workers=settings.reward_workers,
            deadline_s=settings.reward_deadline_s,
            memory_bytes=settings.reward_memory_bytes,
        )
        stack.push_async_callback(rewards.close)
        await rewards.start()

        async def announce(version: int, timings: SwapTimings, fetch_s: float, num_bytes: int) -> None:
            event = {"replica": arguments.name, "version": version, "bytes": num_bytes, "fetch_s": fetch_s}
            await tickets.announce("swap", event | {"pause_ms": timings.pause_s * 1e3, "load_ms": timings.load_s * 1e3})

        folder = await asyncio.to_thread(local_model_folder, config.model.path)
        weights = WeightFollower(client, keys, folder, announce)
        stack.push_async_callback(weights.close)
        server, engine_url = None, settings.engine.url
        if engine_url is None:
            log = arguments.log_folder / f"sglang-{arguments.name}.log"
            server = EngineServer(settings.engine, config.model.dtype, log)
            stack.push_async_callback(server.stop)
            engine_url = server.url
        engine = Engine(engine_url, request_timeout_s=settings.request_timeout_s)
        stack.push_async_callback(engine.aclose)
        replica = Replica(arguments.name, url_of(sock), settings, tickets, engine, server, rewards, weights)
        await stack.enter_async_context(_http(replica, token, sock))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, replica.drain)
        await replica.serve()


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
