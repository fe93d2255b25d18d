"""The simulated loop against hand-worked examples, and that it settles when the advice is followed."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.common.config import load_recipe
from headrace.learner.commands.simulate import follow_advice, measured_in, simulate
from headrace.learner.scaling.simulation import MeasuredRun, Simulation
from tests.support.fake_services import ROOT
from tests.support.guard import GUARD_S

HOUR_S = 3600.0


def make(**changes: Any) -> MeasuredRun:
    """One replica completes a group every 0.5 s; a step needs 4 groups and takes 1 s."""
    fields: dict[str, Any] = {
        "group_durations_s": [2.0],
        "work_s": [1.0],
        "uniform_share": 0.0,
        "groups_per_step": 4,
        "max_staleness": 7,
        "max_groups_in_flight": 4,
    }
    fields |= changes
    return MeasuredRun(**({"max_outstanding_groups": 4 * (fields["max_staleness"] + 1)} | fields))


def test_a_slow_engine_sets_the_pace() -> None:
    planned = simulate(make(), 1, 8)
    assert planned.steps_per_h == pytest.approx(1800, rel=0.02), "4 groups take 2 s"
    assert planned.waiting_share == pytest.approx(0.5, abs=0.02)
    assert planned.idle_share < 0.01
    assert planned.advice.replicas == 2


def test_a_slow_learner_sets_the_pace() -> None:
    planned = simulate(make(work_s=[10.0]), 4, 8)
    assert planned.steps_per_h == pytest.approx(360, rel=0.03)
    assert planned.waiting_share < 0.03
    assert planned.idle_share > 0.5
    assert planned.advice.replicas == 1


def test_balanced_sides_keep_their_number() -> None:
    planned = simulate(make(), 2, 8)
    assert planned.steps_per_h == pytest.approx(3600, rel=0.05)
    assert planned.advice.replicas == 2


def test_uniform_groups_cost_generation_time() -> None:
    planned = simulate(make(uniform_share=0.5), 1, 8)
    assert planned.steps_per_h == pytest.approx(900, rel=0.1)


def test_admission_bounds_outstanding_groups_and_staleness_bounds_trained_ones() -> None:
    for max_staleness, mean in ((0, 0), (1, 1), (2, 2), (2, 0.5)):
        most = int(4 * (mean + 1))
        measured = make(max_staleness=max_staleness, max_outstanding_groups=most, group_durations_s=[1.0, 2.0, 9.0])
        simulation = Simulation(measured, 3, seed=5)
        for second in range(1, 300):
            simulation.run(float(second))
            in_flight = sum(beat.groups_in_flight for beat in simulation.heartbeats())
            assert in_flight <= most
        totals = simulation.totals
        assert totals.steps > 10 and totals.num_trained >= 4 * totals.steps
        assert totals.staleness / totals.num_trained <= mean
        assert math.isclose(totals.waited_s + totals.worked_s, 299.0, abs_tol=2.0)
        assert totals.idle_s <= totals.serving_s == pytest.approx(3 * 299.0)


def test_nothing_is_lost_when_replicas_leave() -> None:
    """Other replicas answer their tickets: the loop continues, and stops only without any replica."""
    simulation = Simulation(make(max_staleness=0), 3, seed=1)
    simulation.run(100.5)
    simulation.set_replicas(1)
    before = simulation.totals.steps
    assert simulation.run(200.0).steps - before == pytest.approx(33, abs=3), "2 s for 4 groups, 1 s for the step"
    simulation.set_replicas(0)
    simulation.run(210.0)
    stands_at = simulation.totals.steps
    assert simulation.run(300.0).steps == stands_at
    simulation.set_replicas(1)
    assert simulation.run(400.0).steps > stands_at + 30


def test_the_same_seed_gives_the_same_result() -> None:
    measured = make(group_durations_s=[0.5, 1.0, 4.0], uniform_share=0.3)
    assert simulate(measured, 2, 8, seed=3) == simulate(measured, 2, 8, seed=3)
    assert simulate(measured, 2, 8, seed=3) != simulate(measured, 2, 8, seed=4)


@pytest.mark.parametrize("needed", [1.0, 1.5, 2.2, 3.7, 5.2])
@pytest.mark.parametrize("start", [1, 3, 8])
def test_under_the_advice_the_loop_settles(needed: float, start: int) -> None:
    """Durations vary; in the end as many replicas run as are needed, without going back and forth."""
    scatter = [0.3, 0.6, 0.8, 1.0, 1.2, 1.5, 1.6]
    measured = make(group_durations_s=[needed * factor for factor in scatter], work_s=scatter, max_staleness=15)
    for seed in range(2):
        ordered = follow_advice(measured, start, 8, HOUR_S, seed)
        assert needed * 0.8 <= ordered[-1] <= math.ceil(needed) + 1, ordered
        turns = [later > earlier for earlier, later in itertools.pairwise(ordered)]
        assert sum(one != other for one, other in itertools.pairwise(turns)) <= 1, f"to and fro: {ordered}"


def write_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(**changes: Any) -> dict[str, Any]:
    row = {"kind": "step", "step": 1, "step_s": 3.0, "wait_s": 1.0, "run_uniform_share": 0.25}
    return row | {"sampling_s_mean": 4.0, "scoring_s_mean": 0.5} | changes


def test_measurements_come_from_the_runs_rows() -> None:
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml").config
    rows = [
        {"kind": "evaluation", "step": 0},
        step_row(),
        step_row(group_durations_s=[1.5, 2.5], run_uniform_share=0.5),
    ]
    assert measured_in(rows, config) == MeasuredRun([4.5, 1.5, 2.5], [2.0, 2.0], 0.5, 16, 2, 48, 32)
    with pytest.raises(ValueError, match="no step has been measured yet"):
        measured_in([{"kind": "evaluation", "step": 0}], config)


def headrace_simulate(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "headrace.launcher", "simulate", "--run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S)


def test_the_command_prints_a_row_for_each_number(tmp_path: Path) -> None:
    write_run(tmp_path / "measured", [step_row(group_durations_s=[1.0] * 16)])
    done = headrace_simulate("measured", "--up-to", "2", "--runs-folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    head, one, two, followed = done.stdout.splitlines()
    assert head == "replicas  steps/hour  learner waits  replicas idle  staleness  advised"
    assert one.split()[0] == "1" and two.split()[0] == "2"
    assert followed.startswith("the advice, followed from 1: 1")


def test_a_run_without_measurements_gives_one_error_line(tmp_path: Path) -> None:
    write_run(tmp_path / "empty", [])
    done = headrace_simulate("empty", "--runs-folder", str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "headrace: run 'empty': no step has been measured yet\n")
    done = headrace_simulate("nowhere", "--runs-folder", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("headrace: run 'nowhere': ") and done.stderr.count("\n") == 1
