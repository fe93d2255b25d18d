"""The demos of several turns by the one command, shortened: they learn, and engine and learner agree."""

import json
from pathlib import Path

import psutil
import pytest

from tests.support.guard import GUARD_S
from tests.support.launched_run import Launched, rows_of, steps_in

NUM_STEPS = 12
SETTINGS = [
    f"learner.steps={NUM_STEPS}",
    f"evaluation.interval_steps={NUM_STEPS}",
    f"generation.engine.liveness_timeout_s={GUARD_S:g}",
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [("guessing", 0.4), ("calculator", 0.15)])
def test_a_demo_of_several_turns_learns(name: str, gain: float, tmp_path: Path) -> None:
    """By `gain` of held-out reward at least."""
    launched = Launched(tmp_path, set[psutil.Process](), SETTINGS, recipe=f"configs/{name}-cpu.yaml")
    try:
        output = launched.end()
    finally:
        launched.process.kill()
    assert steps_in(launched.run) == list(range(1, NUM_STEPS + 1)), output
    summary = json.loads((launched.run / "summary.json").read_text())
    assert summary["held_out_after"] > summary["held_out_before"] + gain
    assert summary["groups"]["dead"] == 0
    fresh = [row for row in rows_of(launched.run, "step") if row["fresh_tokens"]]
    assert fresh and max(row["fresh_logprob_gap_p999"] for row in fresh) < 1e-4
    assert all(row["turns_mean"] > 1 and row["split_share"] == 0 for row in rows_of(launched.run, "step"))
