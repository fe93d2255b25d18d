"""The Redis server under test: with an append-only file, always restarted on the same port.

The kernel kills it with the harness, even while it is frozen.
"""

import subprocess
import time
from pathlib import Path

import psutil

from headrace.common.http.addresses import free_port
from headrace.common.process.child_process import set_parent_death_signal
from headrace.common.redis.client import DURABLE_SETTINGS
from headrace.launcher.run.redis_server import is_answering, redis_binary, redis_url_at

START_TIMEOUT_S = 60.0
POLL_S = 0.05


class RedisServer:
    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.port = free_port()
        folder.mkdir(parents=True)
        self.process = self._launch()

    @property
    def url(self) -> str:
        """The URL that bypasses the proxy."""
        return redis_url_at(self.port)

    @property
    def as_process(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Restarts it; it may not answer yet."""
        self.kill()
        self.process = self._launch()

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_answering(self.url, 1.0):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Redis server does not answer; its log is {self.log}")
            time.sleep(POLL_S)

    def _launch(self) -> subprocess.Popen[bytes]:
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", **DURABLE_SETTINGS}
        arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [redis_binary(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=set_parent_death_signal(),
            )
