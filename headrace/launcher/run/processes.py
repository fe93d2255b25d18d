"""The processes of a run on one machine: each has a log, and none outlives the launcher.

A child has a session of its own, so that a Ctrl-C in the terminal reaches only the launcher, which passes it on. The
kernel ends the child when the launcher dies. The Redis URL may hold a password, so it travels in the environment.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from headrace.common.process.child_process import python_path, set_parent_death_signal
from headrace.common.process.logs import parse_line
from headrace.common.wire import one_line

REDIS_URL_VARIABLE = "HEADRACE_REDIS_URL"
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 1 << 16
REFUSAL = re.compile(r"headrace \w+: (.+)")
"""The line that a service prints when its request is refused before it begins."""


class Service:
    """One child process and its log."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: dict[str, str] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        """`environment` is added to ours; the file descriptors `inherited` stay open in the child."""
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                command,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                start_new_session=True,
                preexec_fn=set_parent_death_signal(signal.SIGTERM),
            )

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, grace_s: float) -> None:
        self.ask_to_stop()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def exit_summary(self) -> str:
        """How it ended, such as `learner was killed by SIGKILL`."""
        code = self.returncode
        if code is not None and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with {code}"

    def log_tail(self) -> str:
        return f"the end of {self.log}:\n" + "\n".join(self._log_lines(0)[-LOG_TAIL_LINES:])

    def last_error(self) -> str:
        """The last error that this process logged, or its refusal; empty if there is none."""
        for text in reversed(self._log_lines(self._log_start)):
            if refused := REFUSAL.match(text):
                return one_line(refused[1])
            line = parse_line(text)
            if line is not None and line.level in ("ERROR", "CRITICAL"):
                return one_line(line.message)
        return ""

    def _log_lines(self, start: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(start, self.log.stat().st_size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()


def python_service(
    name: str,
    module: str,
    arguments: Sequence[str],
    log: Path,
    redis_url: str,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Service:
    return Service(name, [sys.executable, "-m", module, *arguments], log, {**environment, **_environment(redis_url)})


def _environment(redis_url: str) -> dict[str, str]:
    """Variables by which a service finds the run's Redis, and the task where we find it."""
    return {REDIS_URL_VARIABLE: redis_url, "PYTHONPATH": python_path()}


def call_module(module: str, arguments: Sequence[str], redis_url: str) -> int:
    """Runs a module in the foreground and returns its exit code. Ctrl-C is passed on; a second one kills it."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | _environment(redis_url),
        start_new_session=True,
        preexec_fn=set_parent_death_signal(signal.SIGTERM),
    )
    received: list[int] = []

    def pass_on(number: int) -> None:
        received.append(number)
        process.send_signal(number if len(received) == 1 else signal.SIGKILL)

    with handling_signals(pass_on):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def handling_signals(take: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `take` instead of ending this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda received, _: take(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
