"""`headrace simulate`: estimates how a run would go with other numbers of replicas, from what it has measured.

    python -m headrace.learner.commands.simulate --run demo --runs-folder runs

It reads the run's `metrics.jsonl` and `config.yaml` and changes nothing. simulation.py says what the simulation leaves
out; the advice is the learner's own (advice.py).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from headrace.common.config import RunConfig, yaml_text
from headrace.common.wire import Heartbeat
from headrace.learner.reporting.summary import METRICS_FILE, Row, read_rows
from headrace.learner.scaling.advice import MAX_FACTOR, WINDOW_S, Advice, ReplicaAdviser
from headrace.learner.scaling.simulation import MeasuredRun, Simulation

NUM_STEPS = 100
"""About how many steps are simulated for each number of replicas."""
MIN_WINDOWS = 5
STARTUP_S = 30.0
"""How long a new replica takes to start."""
NUM_DECISIONS = 6


class SimulatedRun(NamedTuple):
    """The outcome for one number of replicas."""

    replicas: int
    steps_per_h: float
    waiting_share: float
    """The share of the learner's time that it waits for groups."""
    idle_share: float
    """The share of the replicas' time without a ticket."""
    staleness: float
    advice: Advice


def measured_in(rows: list[Row], config: RunConfig) -> MeasuredRun:
    """Raises `ValueError` if the run has taken no step, or only steps of an older release."""
    steps = [row for row in rows if row["kind"] == "step" and "run_uniform_share" in row]
    if not steps:
        raise ValueError("no step has been measured yet")
    group_durations_s = [duration_s for row in steps for duration_s in _group_durations_s(row)]
    uniform_share = steps[-1]["run_uniform_share"] if config.actor.dynamic_sampling else 0.0
    return MeasuredRun(
        group_durations_s=group_durations_s,
        work_s=[max(1e-3, row["step_s"] - row["wait_s"]) for row in steps],
        uniform_share=min(0.99, uniform_share),
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.learner.max_staleness,
        max_outstanding_groups=config.learner.max_outstanding_groups,
        max_groups_in_flight=config.generation.max_groups_in_flight,
    )


def _group_durations_s(row: Row) -> list[float]:
    """Rows of earlier releases have only the mean."""
    found: list[float] = row.get("group_durations_s") or [row["sampling_s_mean"] + row["scoring_s_mean"]]
    return [max(1e-3, duration_s) for duration_s in found]


def simulate(measured: MeasuredRun, replicas: int, max_replicas: int, seed: int = 0) -> SimulatedRun:
    """Simulates a constant number of replicas."""
    adviser = ReplicaAdviser(replicas, max(replicas, max_replicas), measured.max_groups_in_flight)
    simulation = Simulation(measured, replicas, seed)
    simulation.observe = lambda waited_s, worked_s, beats: adviser.observe(
        waited_s, worked_s, beats, simulation.steps_in_queue
    )
    totals = simulation.run(_long_enough_s(measured, replicas))
    return SimulatedRun(
        replicas=replicas,
        steps_per_h=3600 * totals.steps / simulation.now,
        waiting_share=totals.waited_s / max(1e-9, totals.waited_s + totals.worked_s),
        idle_share=totals.idle_s / max(1e-9, totals.serving_s),
        staleness=totals.staleness / max(1, totals.num_trained),
        advice=adviser.advice,
    )


def follow_advice(measured: MeasuredRun, start: int, max_replicas: int, until_s: float, seed: int = 0) -> list[int]:
    """The numbers of replicas that the advice sets one after another, from `start` on, if each is applied."""
    adviser, targets = ReplicaAdviser(start, max_replicas, measured.max_groups_in_flight), [start]
    simulation = Simulation(measured, start, seed)

    def observe(waited_s: float, worked_s: float, beats: list[Heartbeat]) -> None:
        number = adviser.observe(waited_s, worked_s, beats, simulation.steps_in_queue).replicas
        if number != targets[-1]:
            targets.append(number)
            simulation.request_replicas(number, STARTUP_S)

    simulation.observe = observe
    simulation.run(until_s)
    return targets


def _long_enough_s(measured: MeasuredRun, replicas: int) -> float:
    """Long enough for `NUM_STEPS` steps, whichever side is slower, and for the advice."""
    in_flight = min(measured.max_outstanding_groups, replicas * measured.max_groups_in_flight)
    groups_per_s = in_flight * len(measured.group_durations_s) / sum(measured.group_durations_s)
    generation_s = measured.groups_per_step / (1 - measured.uniform_share) / groups_per_s
    return max(NUM_STEPS * max(generation_s, sum(measured.work_s) / len(measured.work_s)), MIN_WINDOWS * WINDOW_S)


def as_json(measured: MeasuredRun, start: int, max_replicas: int) -> dict[str, Any]:
    """The output of `--json`."""
    rows = [simulate(measured, count, max_replicas) for count in range(1, max_replicas + 1)]
    followed = follow_advice(measured, start, max_replicas, _until_s(measured, start))
    return {"plans": [row._asdict() | {"advice": row.advice._asdict()} for row in rows], "followed": followed}


def lines(measured: MeasuredRun, start: int, max_replicas: int) -> Iterator[str]:
    yield "replicas  steps/hour  learner waits  replicas idle  staleness  advised"
    for count in range(1, max_replicas + 1):
        row = simulate(measured, count, max_replicas)
        yield (
            f"{row.replicas:8}  {row.steps_per_h:10.0f}  {row.waiting_share:13.0%}  {row.idle_share:13.0%}  "
            f"{row.staleness:9.2f}  {row.advice.replicas:7}"
        )
    until_s = _until_s(measured, start)
    targets = follow_advice(measured, start, max_replicas, until_s)
    yield f"the advice, followed from {start}: {' → '.join(map(str, targets))} within {until_s / 60:.0f} minutes"


def _until_s(measured: MeasuredRun, start: int) -> float:
    """Long enough for `NUM_DECISIONS` changes of the advice."""
    return NUM_DECISIONS * max(2 * (WINDOW_S + STARTUP_S), _long_enough_s(measured, start) / NUM_STEPS * MAX_FACTOR)


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace simulate")
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--up-to", type=int, help="replicas; default: generation.max_replicas")
    arguments = parser.parse_args()
    folder = arguments.runs_folder / arguments.run
    try:
        config = RunConfig.model_validate(yaml_text.load((folder / "config.yaml").read_text()))
        rows = read_rows(folder / METRICS_FILE)
        measured = measured_in(rows, config)
        most = arguments.up_to or config.generation.max_replicas
        start = max(1, min(config.generation.replicas, most))
        if arguments.json:
            print(json.dumps(as_json(measured, start, most), indent=2))
        else:
            print("\n".join(lines(measured, start, most)))
    except (OSError, ValidationError, ValueError) as error:
        print(f"headrace: run {arguments.run!r}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
