"""`headrace up` as a child of the harness, and how to find the processes that it started.

They end with the harness, however it ends: the kernel signals the launcher, which ends its children.
"""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from headrace.launcher.run.processes import Service, python_service

ENVIRONMENT_WORKER = "headrace.generation.environments.worker"
CHECKPOINT_EVERY = 2
SETTINGS = (
    f"learner.checkpoint_interval_steps={CHECKPOINT_EVERY}",
    "evaluation.interval_steps=0",
    "evaluation.num_prompts=256",
    "evaluation.completions_per_prompt=2",
    "generation.ticket_lease_s=5",
    "generation.max_groups_in_flight=16",
    "generation.engine.liveness_timeout_s=10",
    # How many steps the faults leave time for is known only afterwards: a rate that does not depend on it, and that
    # still has something to learn after some hundred steps.
    "optimizer.lr=3e-5",
    "optimizer.lr_schedule=constant",
)
STOP_TIMEOUT_S = 180.0
POLL_S = 0.1


class Launched:
    """One run by its name. It can be stopped and started again, and continues where it stopped."""

    def __init__(self, run: str, runs_folder: Path, recipe: Path, redis_url: str | None, num_replicas: int) -> None:
        """Without a URL the run has a Redis server of its own."""
        self.recipe = recipe
        self.run = run
        self.runs_folder = runs_folder
        self.folder = runs_folder / run
        self.redis_url = redis_url
        self.num_replicas = num_replicas
        self.log = self.folder / "logs" / "launcher.log"
        self._service: Service | None = None

    @property
    def returncode(self) -> int | None:
        return None if self._service is None else self._service.returncode

    @property
    def is_running(self) -> bool:
        return self._service is not None and self._service.returncode is None

    def start(self, num_steps: int) -> None:
        settings = [*SETTINGS, f"learner.steps={num_steps}", f"generation.replicas={self.num_replicas}"]
        if self.redis_url is not None:
            settings.append(f"redis_url={self.redis_url}")
        chosen = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "headrace.launcher", "up", str(self.recipe), "--run", self.run]
        self._service = Service("headrace up", [*command, "--runs-folder", str(self.runs_folder), *chosen], self.log)

    def ask_to_stop(self) -> None:
        """Sends SIGINT to the launcher, like Ctrl-C."""
        if self._service is not None and self.is_running:
            self._service.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Stops the launcher and kills what does not end; returns when nothing is left."""
        if self._service is None:
            return
        left = self._descendants()
        self.ask_to_stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.is_running and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._service.kill()
        for process in left:
            _kill(process)
        psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)

    def learner(self) -> psutil.Process | None:
        found = [process for process in self._children() if "headrace.learner" in words_of(process)]
        return found[0] if found else None

    def replica(self, index: int) -> psutil.Process | None:
        name = f"generation-{index}"
        for process in self._children():
            words = words_of(process)
            if "headrace.generation" in words and name in words:
                return process
        return None

    def engine(self, index: int) -> list[psutil.Process]:
        """The HTTP server and the scheduler of the replica's SGLang; empty until both are there."""
        replica = self.replica(index)
        servers = [
            process
            for process in children_of(replica)
            if "headrace.generation.engine.cpu.launch_server" in words_of(process)
        ]
        if not servers:
            return []
        schedulers = [process for process in children_of(servers[0]) if "scheduler" in " ".join(words_of(process))]
        return [servers[0], schedulers[0]] if schedulers else []

    def environment_workers(self, index: int) -> list[psutil.Process]:
        """Of a replica whose task plays episodes."""
        replica = self.replica(index)
        return [process for process in children_of(replica) if ENVIRONMENT_WORKER in words_of(process)]

    def start_replacement(self, redis_url: str) -> Service:
        """Starts a second learner beside the launcher, with the launcher's arguments."""
        arguments = ["--config", str(self.folder / "config.yaml"), "--run", self.run]
        arguments += ["--runs-folder", str(self.runs_folder)]
        log = self.folder / "logs" / "another-learner.log"
        return python_service("another learner", "headrace.learner", arguments, log, redis_url)

    def logs(self) -> Sequence[Path]:
        return sorted((self.folder / "logs").glob("*.log"))

    def _children(self) -> list[psutil.Process]:
        if self._service is None or not self.is_running:
            return []
        try:
            return children_of(psutil.Process(self._service.process.pid))
        except psutil.NoSuchProcess:
            return []

    def _descendants(self) -> list[psutil.Process]:
        found = self._children()
        return [*found, *(grandchild for child in found for grandchild in children_of(child, recursive=True))]


def children_of(process: psutil.Process | None, recursive: bool = False) -> list[psutil.Process]:
    """The children that are alive."""
    try:
        found = [] if process is None else process.children(recursive=recursive)
    except psutil.Error:
        return []
    return [child for child in found if is_alive(child)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def words_of(process: psutil.Process) -> list[str]:
    try:
        return [str(word) for word in process.cmdline()]
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()
