"""The parts that faults hit: Redis behind a proxy, a small disk for the checkpoints, and the run that uses both.

Every wait has a deadline. It ends at once, with the last lines of the logs, when the launcher ends unexpectedly, and
meanwhile it ends injected faults whose time is over. After the `with` block no process of it is left; the run's files
are in its folder.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from chaos.disk import SmallDisk, unmount
from chaos.episodes.groups import GroupChecks
from chaos.launched import Launched
from chaos.observer import Observer
from chaos.proxy import Proxy
from chaos.redis_server import RedisServer
from chaos.schedule import Fault
from headrace.common.redis.keys import Keys
from headrace.launcher.run.redis_server import redis_url_at
from headrace.launcher.run.run_folder import run_lock

POLL_S = 0.1
TAIL_LINES = 12
TAIL_BYTES = 1 << 15


class ChaosError(RuntimeError):
    """The run did not reach an expected state in time; the text ends with the last lines of the logs."""


@dataclass
class InjectedFault:
    """A fault that was injected, and when it ended."""

    fault: Fault
    target: str
    began_s: float
    is_over: Callable[[], bool] = lambda: True
    end: Callable[[], None] = lambda: None
    ended_s: float | None = None
    needs_checkpoint: bool = False
    """The run has recovered only when a checkpoint was written after the fault's end."""
    note: str = ""
    recovery_s: float | None = None
    """None: counted with the fault that overlapped it."""

    def end_if_due(self) -> None:
        if self.ended_s is None and self.is_over():
            self.finish()

    def finish(self) -> None:
        if self.ended_s is None:
            with suppress(psutil.NoSuchProcess):
                self.end()
            self.ended_s = time.time()


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since this call."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


class TestBed:
    """The test bed of one run; all its files are in the run's folder."""

    __test__ = False
    """Not a test case of pytest."""

    def __init__(self, run: str, runs_folder: Path, recipe: Path, num_replicas: int, group_checks: GroupChecks) -> None:
        folder = runs_folder / run
        clear(folder)
        (folder / "logs").mkdir(parents=True)
        self.checkpoints = folder / "checkpoints"
        self.injected: list[InjectedFault] = []
        self._stack = ExitStack()
        self.disk = SmallDisk(self.checkpoints)
        self._stack.callback(self.disk.close)
        try:
            self.redis = RedisServer(folder / "redis", folder / "logs" / "redis.log")
            self._stack.callback(lambda: self.redis.kill())
            self.redis.wait_until_it_answers()
            self.proxy = self._stack.enter_context(Proxy(self.redis.port))
            self.observer = Observer(self.redis.url, Keys(run), num_replicas, group_checks)
            self._stack.callback(self.observer.close)
            self.launched = Launched(run, runs_folder, recipe, self.proxied_url, num_replicas)
            self._stack.callback(self.launched.close)
            self._stack.callback(self.end_faults)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def proxied_url(self) -> str:
        return redis_url_at(self.proxy.port)

    def end_faults(self) -> None:
        for injected_fault in self.injected:
            injected_fault.finish()

    def wait_until(
        self, condition: Callable[[], bool], timeout_s: float, what: str, is_launcher_needed: bool = True
    ) -> None:
        """Raises `ChaosError` naming `what` after `timeout_s`, or when the launcher ends though it is needed."""
        deadline = time.monotonic() + timeout_s
        while True:
            for injected_fault in self.injected:
                injected_fault.end_if_due()
            self.observer.poll()
            if condition():
                return
            if is_launcher_needed and not self.launched.is_running:
                raise self.error(f"headrace up ended with {self.launched.returncode}; expected {what}")
            if time.monotonic() > deadline:
                raise self.error(f"expected {what} within {timeout_s:.0f} s; {self.observer.describe()}")
            time.sleep(POLL_S)

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= until, seconds + 60.0, "a pause")

    def error(self, text: str) -> ChaosError:
        tails = [f"--- the end of {log}:\n{tail_of(log)}" for log in self.launched.logs()]
        return ChaosError("\n".join([text, *tails]))


def tail_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


def clear(folder: Path) -> None:
    """Deletes the run of an earlier harness with the same seed; raises `ValueError` if that one still runs."""
    if folder.exists():
        with run_lock(folder):
            unmount(folder / "checkpoints")
            shutil.rmtree(folder)
