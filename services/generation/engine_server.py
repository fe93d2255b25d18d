"""Owns one SGLang server as a child process: starts it on a free port, waits until it is healthy, stops it.

`start` returns with a server that answers, or raises with the last lines of its log. `stop` leaves no process
behind, SGLang's own children included. If this process dies, even of SIGKILL, the server dies with it. On a CPU
the server is the real SGLang too, through `services.generation.sglang_cpu`; on CUDA it is the plain one.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from common.child_process import dies_with_parent
from common.config import EngineConfig
from common.device import CPU_MAX_TOTAL_TOKENS, resolve_device
from common.http_service import free_port
from common.preflight import check_engine_installed
from services.generation.engine import EngineError

HOST = "127.0.0.1"
POLL_S = 0.05
HEALTH_TIMEOUT_S = 30.0
STOP_GRACE_S = 6.0
"""SGLang looks every 5 s whether it has been asked to stop."""
KILL_DEADLINE_S = 5.0
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 1 << 16
CPU_MEMORY_FRACTION = 0.3
REPOSITORY = Path(__file__).resolve().parents[2]
CPU_PACKAGES = Path(sys.prefix) / "sglang-cpu"
"""Where `make setup` puts torchvision for SGLang alone: it is a CUDA build, with which no other process can import
transformers beside CPU torch."""
_log = logging.getLogger(__name__)


class EngineServer:
    """One SGLang server; it may be started again after its end, on another model folder, at the same address."""

    def __init__(self, settings: EngineConfig, dtype: str, log_path: Path) -> None:
        self.settings = settings
        self.dtype = dtype
        self.log_path = log_path
        self.port = free_port()
        self.ready = asyncio.Event()
        """Set while `keep_running` has a healthy server."""
        self._process: subprocess.Popen[bytes] | None = None

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
        """Starts the server and waits until `/health` answers; raises `EngineError` with the log's end otherwise.

        To be called on a thread that lives as long as the server: the kernel ends the child with that thread.
        """
        assert not self.is_alive, "the server already runs"
        check_engine_installed()
        command = launch_command(self.settings, self.dtype, model_path, weight_version, self.port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=launch_environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in our terminal is ours; and the group is killed as one
                preexec_fn=dies_with_parent(),
            )
        try:
            await self._wait_until_healthy()
        except BaseException:
            await self.stop()
            raise

    async def keep_running(self, where: Callable[[], tuple[Path, int | None]]) -> None:
        """Until cancelled: starts the server on the model folder and version of `where`, again whenever it ends.

        Raises `EngineError` if a start fails.
        """
        while True:
            await self.start(*where())
            self.ready.set()
            while self.is_alive:
                await asyncio.sleep(POLL_S)
            self.ready.clear()
            _log.error("SGLang exited with %s, starting it again", self.returncode)

    async def stop(self) -> None:
        """SIGTERM, SIGKILL after a grace; returns when the server and all processes of its group are gone."""
        if self._process is None:
            return
        group = self._process.pid
        _signal_group(group, signal.SIGTERM)
        await _until(lambda: self.returncode is not None, STOP_GRACE_S)
        _signal_group(group, signal.SIGKILL)
        await _until(lambda: self.returncode is not None and not _signal_group(group, 0), KILL_DEADLINE_S)

    async def _wait_until_healthy(self) -> None:
        deadline_s = time.monotonic() + self.settings.startup_timeout_s
        async with httpx.AsyncClient(timeout=HEALTH_TIMEOUT_S, trust_env=False) as http:
            while time.monotonic() < deadline_s:
                if not self.is_alive:
                    raise EngineError(f"SGLang exited with {self.returncode} at its start; {self._log_tail()}")
                try:
                    if (await http.get(f"{self.url}/health")).status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass  # it does not listen yet
                await asyncio.sleep(POLL_S)
        raise EngineError(f"SGLang not healthy within {self.settings.startup_timeout_s:g} s; {self._log_tail()}")

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return f"the end of {self.log_path}:\n" + "\n".join(lines[-LOG_TAIL_LINES:])


def launch_command(
    settings: EngineConfig, dtype: str, model_path: str | Path, weight_version: int | None, port: int
) -> list[str]:
    on_cpu = resolve_device(settings.device) == "cpu"
    max_total_tokens, memory_fraction = settings.max_total_tokens, settings.memory_fraction
    module = "sglang.launch_server"
    args = ["--model-path", str(model_path), "--host", HOST, "--port", str(port), "--log-level", "warning"]
    if on_cpu:
        module = "services.generation.sglang_cpu"
        args += ["--device", "cpu", "--skip-server-warmup", "--sleep-on-idle"]  # idle, it would spin on a core
        # What a prefix cache saves is less than its bookkeeping costs; and four decode steps between two looks for
        # prefills make these fewer and larger: together about 1.4 times the tokens per second.
        args += ["--disable-radix-cache", "--num-continuous-decode-steps", "4"]
        max_total_tokens = max_total_tokens or CPU_MAX_TOTAL_TOKENS
        memory_fraction = memory_fraction or CPU_MEMORY_FRACTION
    args += ["--dtype", dtype, "--max-running-requests", str(settings.max_running_requests)]
    if max_total_tokens is not None:
        args += ["--max-total-tokens", str(max_total_tokens)]
    if memory_fraction is not None:
        args += ["--mem-fraction-static", str(memory_fraction)]
    if weight_version is not None:
        args += ["--weight-version", str(weight_version)]
    return [sys.executable, "-m", module, *args, *settings.extra_args]


def launch_environment(settings: EngineConfig) -> dict[str, str]:
    """Ours, and on a CPU what makes SGLang use it, with few threads that do not spin beside the learner's."""
    environment = dict(os.environ)
    if resolve_device(settings.device) == "cpu":
        search_path = [str(REPOSITORY), str(CPU_PACKAGES), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(settings.num_threads),
            "MKL_NUM_THREADS": str(settings.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(search_path),
        }
    return environment


def _signal_group(group: int, signal_number: int) -> bool:
    """Whether the process group still exists; signal 0 only asks."""
    try:
        os.killpg(group, signal_number)
    except ProcessLookupError:
        return False
    return True


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        await asyncio.sleep(POLL_S)
