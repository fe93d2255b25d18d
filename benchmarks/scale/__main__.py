"""The load that one learner and one Redis can carry: 1 to 64 replicas with simulated engines, without a GPU.

    python -m benchmarks.scale [--replicas 1 2 4 8 16 32 64] [--stretch 1 8] [--seconds 30] [--processes 2]

The learner's program, the replicas (leases, commits, heartbeats, fetching and building weights, HTTP service) and a
durable Redis are real. Engines, rewards and a step's computation take the time that was recorded in a run of the demo
(simulated_replicas.py, simulated_learner.py). The batch grows with the number of replicas, as users would configure it,
so that a step takes as long with 64 replicas as with one. `--stretch 8` makes all completions 8 times as long, and
everything 8 times as slow.

For each number of replicas it reports the work done in `--seconds`, and the processor time of Redis, the learner and
the simulated replicas. `limits.py` determines the bottleneck by a rule. Rows go to benchmarks/results/scale.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from rich.console import Console

from benchmarks.cpu_time import cpu_seconds
from benchmarks.demo import ROOT, cpu_model
from benchmarks.scale.limits import Row, judge, report
from benchmarks.scale.recorded_run import RecordedRun, read_recorded
from headrace.common.process.run_token import TOKEN_VARIABLE
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import DELTA_FILE, stored_versions, version_folder
from headrace.launcher.run.processes import REDIS_URL_VARIABLE, Service
from headrace.launcher.run.redis_server import start_redis
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
RECIPE = ROOT / "configs" / "tiny-cpu.yaml"
TOKEN = "benchmark"
WARM_STEPS = 4
MIN_STEPS = 4
DEADLINE_S = 600.0
POLL_S = 0.1


class Spent(NamedTuple):
    """Processor seconds since the start of the processes or of the machine."""

    redis: float
    learner: float
    replicas: Sequence[float]
    """For each process of replicas."""
    machine: float


class Stack:
    """The processes of one measurement."""

    def __init__(self, folder: Path, count: int, stretch: float, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.keys = Keys("scale")
        self.redis, url = start_redis(folder / "redis", folder / "redis.log")
        self.client = connect(url)
        environment = {REDIS_URL_VARIABLE: url, TOKEN_VARIABLE: TOKEN}
        settings = overrides(read_recorded(), count, stretch)
        chosen = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "benchmarks.scale.simulated_learner", str(stretch), str(arguments.millions)]
        command += ["--config", str(RECIPE), "--run", "scale", "--runs-folder", str(folder), *chosen]
        self.learner = Service("learner", command, folder / "learner.log", environment)
        names = [f"replica-{place}" for place in range(count)]
        shares = [names[first :: arguments.processes] for first in range(min(arguments.processes, count))]
        command = [sys.executable, "-m", "benchmarks.scale.simulated_replicas", str(stretch)]
        self.replicas = [
            Service(f"replicas-{place}", [*command, *share], folder / f"replicas-{place}.log", environment)
            for place, share in enumerate(shares)
        ]

    def stop(self) -> None:
        for services in (self.replicas, [self.learner], [self.redis]):
            for service in services:
                service.ask_to_stop()
            for service in services:
                service.stop(60.0)

    def steps(self) -> list[dict[str, Any]]:
        """The rows of all steps. Raises `RuntimeError` if a process has ended."""
        for service in (self.redis, self.learner, *self.replicas):
            if service.returncode is not None:
                raise RuntimeError(f"{service.exit_summary()}: {service.log_tail()}")
        return [row for row in read_rows(self.folder / "scale" / METRICS_FILE) if row["kind"] == "step"]

    def wait_for_steps(self, count: int) -> list[dict[str, Any]]:
        deadline_s = time.monotonic() + DEADLINE_S
        while len(steps := self.steps()) < count:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{len(steps)} steps within {DEADLINE_S:.0f} s; {self.learner.log_tail()}")
            time.sleep(POLL_S)
        return steps

    def spent(self) -> Spent:
        machine = psutil.cpu_times()
        idle_s = machine.idle + getattr(machine, "iowait", 0.0)
        return Spent(
            cpu_seconds(self.redis),
            cpu_seconds(self.learner),
            [cpu_seconds(service) for service in self.replicas],
            sum(machine[:8]) - idle_s,
        )

    def counts(self) -> dict[str, int]:
        """Redis's counters since its start."""
        stream: Any = self.client.xinfo_stream(self.keys.groups)
        stats: Any = self.client.info("stats")
        return {"groups": stream["entries-added"], "commands": stats["total_commands_processed"]}

    def delta_bytes(self) -> int:
        """Size of the newest version that is a delta."""
        (root,) = (self.folder / "scale" / "weights").glob("epoch-*")
        sizes = [(version_folder(root, version) / DELTA_FILE) for version in sorted(stored_versions(root))]
        return next((path.stat().st_size for path in reversed(sizes) if path.exists()), 0)


def overrides(recorded: RecordedRun, count: int, stretch: float) -> list[str]:
    return [
        f"learner.groups_per_step={recorded.groups_per_step * count}",
        f"generation.max_groups_in_flight={recorded.groups_in_flight}",
        f"actor.group_size={recorded.group_size}",
        f"sampling.max_new_tokens={int(recorded.max_new_tokens * stretch)}",
        "generation.engine.url=http://127.0.0.1:1",
        "learner.steps=1000000",
        "evaluation.interval_steps=0",
        "evaluation.num_prompts=1",
        "evaluation.completions_per_prompt=1",
    ]


@contextmanager
def stacked(count: int, stretch: float, arguments: argparse.Namespace) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="headrace-scale-") as folder, ExitStack() as exits:
        stack = Stack(Path(folder), count, stretch, arguments)
        exits.callback(stack.stop)
        yield stack


def measure(count: int, stretch: float, arguments: argparse.Namespace) -> Row:
    with stacked(count, stretch, arguments) as stack:
        num_before = len(stack.wait_for_steps(WARM_STEPS))
        counts, spent, began_s, memory = stack.counts(), stack.spent(), time.monotonic(), 0
        while time.monotonic() < began_s + arguments.seconds:
            time.sleep(1.0)
            memory = max(memory, int(stack.client.info("memory")["used_memory"]))
        steps = stack.wait_for_steps(num_before + MIN_STEPS)
        seconds, after, spent_after = time.monotonic() - began_s, stack.counts(), stack.spent()
        return {
            "stretch": stretch,
            "replicas": count,
            "seconds": seconds,
            "groups_per_s": (after["groups"] - counts["groups"]) / seconds,
            **of_steps(steps[num_before - 1 :], stack.delta_bytes()),
            "redis_commands_per_s": (after["commands"] - counts["commands"]) / seconds,
            "redis_mib": memory / 2**20,
            **shares(spent, spent_after, seconds),
        }


def of_steps(steps: list[dict[str, Any]], delta_bytes: int) -> Row:
    """Numbers from the end of the first step to the end of the last."""
    first, last, inner = steps[0], steps[-1], steps[1:]
    seconds, levels = last["time_s"] - first["time_s"], [level for step in inner for level in step["group_staleness"]]
    egress = (last["sent_bytes"] - first["sent_bytes"]) / len(inner)
    return {
        "steps": len(inner),
        "step_s": seconds / len(inner),
        "learner_waits": sum(step["wait_s"] for step in inner) / seconds,
        "tokens_per_s": (last["run_generated_tokens"] - first["run_generated_tokens"]) / seconds,
        "staleness_mean": float(np.mean(levels)),
        "staleness_p95": float(np.percentile(levels, 95)),
        "stale_share": last["run_stale_share"],
        "egress_bytes_per_version": egress,
        "egress_copies": egress / delta_bytes if delta_bytes else None,
    }


def shares(before: Spent, after: Spent, seconds: float) -> Row:
    """Shares of one core each; the machine's is a share of all its cores."""
    ours = [(now - then) / seconds for then, now in zip(before.replicas, after.replicas, strict=True)]
    busy = (after.machine - before.machine) / seconds
    found = {
        "redis_cpu": (after.redis - before.redis) / seconds,
        "learner_cpu": (after.learner - before.learner) / seconds,
        "replicas_cpu": sum(ours),
        "busiest_replicas_cpu": max(ours),
    }
    own = found["redis_cpu"] + found["learner_cpu"] + found["replicas_cpu"]
    cores = os.cpu_count() or 1
    return found | {"machine": busy / cores, "others_cpu": max(0.0, busy - own)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--stretch", type=float, nargs="+", default=[1.0, 8.0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(
        "--millions", type=float, default=2.0, help="size of the model, in millions of bfloat16 weights"
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes that run the replicas")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    console = Console(highlight=False, width=160)
    for stretch in arguments.stretch:
        for count in arguments.replicas:
            rows.append(measure(count, stretch, arguments))
            console.print(json.dumps(rows[-1]), soft_wrap=True)
    machine = {"cores": os.cpu_count(), "cpu": cpu_model(), "load_average_at_the_end": os.getloadavg()[1]}
    asked = {name: value for name, value in vars(arguments).items() if name != "output"}
    judged = [judge([row for row in rows if row["stretch"] == stretch]) for stretch in arguments.stretch]
    found = {"machine": machine, "arguments": asked, "judged": judged, "rows": rows}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    report(rows, judged, console)


if __name__ == "__main__":
    main()
