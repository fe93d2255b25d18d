"""Owns one SGLang server as a child process: starts it on a free port, waits until it is healthy, stops it.

`start` returns when the server answers, or raises an error with the last lines of its log. `stop` and `kill` end the
server and all its child processes within seconds. If this process dies, even by SIGKILL, the server dies with it.
"""

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.common.hardware.device import resolve_device
from headrace.common.http.addresses import free_port
from headrace.common.preflight.recipe import check_engine_installed
from headrace.common.process.child_process import set_parent_death_signal
from headrace.generation.engine.client import EngineError
from headrace.generation.engine.command import HOST, launch_command, launch_environment
from headrace.generation.engine.shared_gpu import settings_beside_learner

POLL_S = 0.05
HEALTH_TIMEOUT_S = 30.0
STOP_GRACE_S = 1.0
"""Time between SIGTERM and SIGKILL. It is short because a server has no state to save."""
KILL_DEADLINE_S = 5.0
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 1 << 16
_log = logging.getLogger(__name__)


class EngineServer:
    """One SGLang server. After it has ended it may be started again, on another model folder, at the same address."""

    def __init__(
        self,
        settings: EngineConfig,
        dtype: str,
        log_path: Path,
        learner_fraction: float | None = None,
        trust_remote_code: bool = False,
        environment: EnvironmentConfig | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`learner_fraction`: the learner's share of the GPU's memory, if engine and learner share a GPU. The last two
        are those of `launch_command`; the attribute `environment` may be set until a start."""
        self.settings = settings
        self.environment = environment
        self.chat_template = chat_template
        self.trust_remote_code = trust_remote_code
        self.dtype = dtype
        self.log_path = log_path
        self.port = free_port()
        self.learner_fraction = learner_fraction
        self._is_on_cpu = resolve_device(settings.device) == "cpu"
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: str | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def returncode(self) -> int | None:
        """The server's exit status; None while it runs and before its first start."""
        return None if self._process is None else self._process.poll()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, model_path: str | Path, weight_version: int | None) -> None:
        """Starts the server and waits until `/health` answers; else raises `EngineError` with the end of the log.

        Call it on a thread that lives as long as the server: the kernel ends the child with that thread.
        """
        assert not self.is_alive, "the server already runs"
        check_engine_installed()
        settings = self.settings
        if self.learner_fraction is not None:
            settings = await asyncio.to_thread(settings_beside_learner, settings, self.learner_fraction)
        command = launch_command(
            settings, self.dtype, model_path, weight_version, self.port, self.environment, self.chat_template
        )
        command += ["--trust-remote-code"] * self.trust_remote_code
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.mkdtemp(prefix="headrace-engine-")  # for its sockets, which it does not delete
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=launch_environment(self.settings) | {"TMPDIR": self._temporary},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C does not reach it, and the process group can be killed as one
                preexec_fn=set_parent_death_signal(),
            )
        try:
            await self._wait_until_healthy()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after `STOP_GRACE_S`; returns when all processes of the group have ended."""
        if self._process is None:
            return
        _signal_group(self._process.pid, signal.SIGTERM)
        try:
            await _until(lambda: self.returncode is not None, STOP_GRACE_S)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Sends SIGKILL to the whole process group; this also ends processes that hang or are stopped."""
        if self._process is None:
            return
        group = self._process.pid
        _signal_group(group, signal.SIGKILL)
        if not await _until(lambda: self.returncode is not None and not _signal_group(group, 0), KILL_DEADLINE_S):
            _log.error("processes of SGLang's process group %d exist %g s after SIGKILL", group, KILL_DEADLINE_S)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def busy_s(self) -> float | None:
        """CPU seconds used by the server's processes so far; None on a GPU, where an idle SGLang spins."""
        if self._process is None or not self._is_on_cpu:
            return None
        return sum(_cpu_s(stat, self._process.pid) for stat in Path("/proc").glob("[0-9]*/stat"))

    async def _wait_until_healthy(self) -> None:
        deadline_s = time.monotonic() + self.settings.startup_timeout_s
        async with httpx.AsyncClient(trust_env=False) as http:
            while (left_s := deadline_s - time.monotonic()) > 0:
                if not self.is_alive:
                    raise EngineError(f"SGLang exited with {self.returncode} during its start; {self._log_tail()}")
                try:
                    timeout_s = min(left_s, HEALTH_TIMEOUT_S)
                    if (await http.get(f"{self.url}/health", timeout=timeout_s)).status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass  # the server does not listen yet
                await asyncio.sleep(POLL_S)
        raise EngineError(f"SGLang not healthy within {self.settings.startup_timeout_s:g} s; {self._log_tail()}")

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return f"the end of {self.log_path}:\n" + "\n".join(lines[-LOG_TAIL_LINES:])


def _signal_group(group: int, signal_number: int) -> bool:
    """Sends the signal and returns whether the process group exists; signal 0 only tests that."""
    try:
        os.killpg(group, signal_number)
    except ProcessLookupError:
        return False
    return True


def _cpu_s(stat: Path, group: int) -> float:
    """CPU seconds of the process if it belongs to the process group, else 0 (`man 5 proc_pid_stat`)."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:  # the process has ended
        return 0.0
    is_member = int(fields[2]) == group
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if is_member else 0.0


async def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(POLL_S)
    return True
