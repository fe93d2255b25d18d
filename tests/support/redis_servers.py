"""Real Redis servers for tests: plain ones, and a master with its replica and a Sentinel that watches them."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis

from headrace.common.http.addresses import free_port
from headrace.common.redis.client import DURABLE_SETTINGS
from headrace.launcher.run.processes import Service
from headrace.launcher.run.redis_server import redis_binary, start_redis
from tests.support import fake_services
from tests.support.guard import GUARD_S

Start = Callable[..., int]
DOWN_AFTER_MS = 3000
until = partial(fake_services.until, what="what is waited for")


@contextmanager
def as_launched(folder: Path) -> Iterator[str]:
    """As `headrace up` starts it; its URL."""
    service, url = start_redis(folder, folder / "redis.log")
    try:
        yield url
    finally:
        service.stop(GUARD_S)


@contextmanager
def servers(folder: Path) -> Iterator[Start]:
    """Starts a server with these settings and waits until it answers; its port."""
    services: list[Service] = []

    def start(*arguments: str, **settings: str) -> int:
        port = free_port()
        place = folder / str(port)
        place.mkdir()
        options = {"port": str(port), "bind": "127.0.0.1", "dir": str(place), "save": "", **settings}
        flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", *value.split(" "))]
        services.append(Service(f"redis-{port}", [redis_binary(), *arguments, *flags], place / "log"))
        until(lambda: answers(port))
        return port

    try:
        yield start
    finally:
        for service in services:
            service.kill()


def answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False


def asked(port: int, *command: str, password: str | None = None) -> Any:
    with redis.Redis(port=port, password=password) as client:
        return client.execute_command(*command)


class Watched:
    """A durable master, its replica, and a Sentinel. `url` names the master, whichever it is."""

    def __init__(self, start: Start, folder: Path) -> None:
        durable = {name.replace("-", "_"): value for name, value in DURABLE_SETTINGS.items()}
        self.master = start(**durable)
        self.replica = start(replicaof=f"127.0.0.1 {self.master}", **durable)
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            f"sentinel monitor run 127.0.0.1 {self.master} 1\n"
            f"sentinel down-after-milliseconds run {DOWN_AFTER_MS}\nsentinel failover-timeout run 4000\n"
        )
        self.sentinel = start(str(configuration), "--sentinel")
        until(lambda: len(asked(self.sentinel, "SENTINEL", "REPLICAS", "run")) == 1)
        self.url = f"redis+sentinel://127.0.0.1:{self.sentinel}/run/0"
        until(lambda: self.replication()["master_link_status"] == "up")

    def replication(self) -> dict[str, Any]:
        """As the replica sees it."""
        found: dict[str, Any] = asked(self.replica, "INFO", "replication")
        return found

    def replicate_no_more(self) -> None:
        """What the master acknowledges from now on is lost when it falls, which must be soon: after ten times
        `DOWN_AFTER_MS` the Sentinel would not promote such a replica any more."""
        asked(self.replica, "CONFIG", "SET", "masterauth", "wrong")
        asked(self.master, "CLIENT", "KILL", "TYPE", "replica")
        until(lambda: self.replication()["master_link_status"] == "down")

    def fall(self) -> None:
        """The master is killed; returns when the replica is the master."""
        with redis.Redis(port=self.master) as client:
            pid: Any = client.info("server")["process_id"]
        os.kill(int(pid), signal.SIGKILL)
        until(lambda: self.replication()["role"] == "master")
