"""`headrace up`: runs the services of one run on this machine until the run is complete, and shows how it goes.

A replica that ends unasked is started again; a learner that ends decides the run. Ctrl-C stops in order: the
learner with a checkpoint, the replicas with their tickets handed back, then Redis.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from rich.console import Console

from common.config import Recipe
from common.http_service import token_at
from common.keys import Keys
from common.preflight import check_run
from common.redis_client import connect
from services.launcher.processes import Service, python_service, start_redis
from services.launcher.watch import Watcher

LOOK_INTERVAL_S = 0.25
LEARNER_GRACE_S = 120.0
REPLICA_GRACE_S = 30.0
REDIS_GRACE_S = 30.0
MAX_RESTARTS = 5


class Failed(RuntimeError):
    """A service failed; the text has the end of its log."""


def up(recipe: Recipe, run: str, runs_folder: Path, console: Console) -> None:
    """Returns when the run is complete or was stopped. Raises `ValueError` before anything starts, else `Failed`."""
    keys, folder = Keys(run), runs_folder / run
    check_run(recipe.config)
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / "config.yaml"
    config_path.write_text(yaml.safe_dump(recipe.config.model_dump(mode="json"), sort_keys=False))
    token_at(folder / "token")
    with ExitStack() as stack:
        interrupted = stack.enter_context(_interrupts())
        redis_url = recipe.config.redis_url
        if redis_url is None:
            server, redis_url = start_redis(folder / "redis", folder / "logs" / "redis.log")
            stack.callback(server.stop, REDIS_GRACE_S)
        client = connect(redis_url)
        watcher = stack.enter_context(Watcher(client, keys, recipe.config.learner.steps, console))
        watcher.skip_to_now()
        client.hdel(keys.learner, "phase", "reason")
        watcher.say(f"run {run} in {folder}: logs in {folder / 'logs'}")
        common = ["--run", run, "--redis-url", redis_url]
        learner = python_service(
            "learner",
            "services.learner",
            ["--config", str(config_path), "--runs-folder", str(runs_folder), *common],
            folder / "logs" / "learner.log",
        )
        stack.callback(learner.stop, LEARNER_GRACE_S)
        replicas = Replicas(
            recipe.config.generation.replicas, [*common, "--token-file", str(folder / "token")], folder / "logs"
        )
        stack.callback(replicas.stop)
        _watch(learner, replicas, watcher, interrupted)
    _tell_results(folder, console)


class Replicas:
    """The generation processes of this machine."""

    def __init__(self, count: int, arguments: list[str], logs: Path) -> None:
        self.arguments = arguments
        self.logs = logs
        self.num_restarts = 0
        self.services = [self._start(index) for index in range(count)]

    def restart_dead(self) -> Iterator[str]:
        """Starts what has ended again; yields a line about each. Raises `Failed` when that does not help."""
        for index, service in enumerate(self.services):
            if service.returncode is None:
                continue
            if self.num_restarts == MAX_RESTARTS or service.returncode == 2:
                raise Failed(
                    f"{service.name} ended with {service.returncode}; the end of {service.log}:\n{service.log_tail()}"
                )
            self.num_restarts += 1
            yield f"{service.name} ended with {service.returncode}: start {self.num_restarts} of {MAX_RESTARTS} more"
            self.services[index] = self._start(index)

    def stop(self) -> None:
        for service in self.services:
            service.ask_to_stop()
        for service in self.services:
            service.stop(REPLICA_GRACE_S)

    def _start(self, index: int) -> Service:
        name = f"generation-{index}"
        arguments = [*self.arguments, "--name", name, "--log-folder", str(self.logs)]
        return python_service(name, "services.generation", arguments, self.logs / f"{name}.log")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(learner: Service, replicas: Replicas, watcher: Watcher, interrupted: list[int]) -> None:
    is_stopping = False
    while learner.returncode is None:
        if interrupted and not is_stopping:
            is_stopping = True
            watcher.say("stopping: the learner finishes its step and writes a checkpoint")
            learner.ask_to_stop()
        for line in () if is_stopping else replicas.restart_dead():
            watcher.say(line)
        watcher.look()
        time.sleep(LOOK_INTERVAL_S)
    watcher.look()
    if learner.returncode != 0:
        raise Failed(f"the learner ended with {learner.returncode}; the end of {learner.log}:\n{learner.log_tail()}")


def _tell_results(folder: Path, console: Console) -> None:
    summary_path = folder / "summary.json"
    if not summary_path.exists():
        console.print(f"stopped before the end; go on with: headrace up … --run {folder.name}")
        return
    summary = json.loads(summary_path.read_text())
    before, after = summary["held_out_before"], summary["held_out_after"]
    console.print(
        f"held-out pass@1 {before:.3f} → {after:.3f} in {summary['steps']} steps and {summary['wall_s']:.0f} s; "
        f"{summary['tokens_per_s']:.0f} tokens/s; weight pause p50 {summary['weight_pause_ms']['p50']:.0f} ms",
        soft_wrap=True,
    )
    for name in ("summary.json", "metrics.jsonl", "reward-curve.png", "policy", "config.yaml", "logs"):
        console.print(f"  {os.path.relpath(folder / name)}", highlight=False)
