"""The whole stack by its one command: a short run with the real SGLang, stopped, taken up again, shot at, complete."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from transformers import AutoModelForCausalLM

from headrace.common.config import load_recipe
from headrace.common.hardware.device import CPU_MAX_TOTAL_TOKENS
from headrace.launcher.estimates.device_memory import engine_bytes, learner_bytes
from headrace.launcher.estimates.host_memory import disk_rows, host_rows
from headrace.launcher.estimates.model_size import shape_of
from headrace.launcher.estimates.traffic import delta_share
from tests.support.fake_services import ROOT, redis_of
from tests.support.guard import GUARD_S
from tests.support.launched_run import Launched, is_alive, rows_of, steps_in
from tests.support.memory_watch import MemoryWatch

pytestmark = pytest.mark.timeout(3600)
"""About two minutes on two idle cores, most of it three starts of SGLang."""
STEPS = 20
STEPS_OF_AN_OUTAGE = 4
"""That many may have been taken before it, and be told only after it."""
SHORT = [
    f"learner.steps={STEPS}",
    "learner.groups_per_step=4",
    "learner.checkpoint_interval_steps=2",
    "evaluation.num_prompts=16",
    "evaluation.interval_steps=2",
    f"generation.engine.liveness_timeout_s={GUARD_S:g}",
]


class Finished(NamedTuple):
    run: Path
    first: str
    """What the first launcher said."""
    second: str
    processes: set[psutil.Process]
    """Every process of the launchers that was seen."""
    memory: dict[str, int]
    """Of the second launcher and its processes: the most that was seen, by the rows of `headrace check`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Its Redis is killed after step 1; a Ctrl-C comes when steps are taken again; then the learner and the replica are
    killed."""
    runs, seen = tmp_path_factory.mktemp("runs"), set[psutil.Process]()
    first = Launched(runs, seen, SHORT)
    second = None
    try:
        first.wait_for("step 1,")
        redis_of(first.run).kill()
        first.wait_for("redis was killed by SIGKILL: starting it again")
        told = [int(number) for number in re.findall(r"] step (\d+),", first.output)]
        first.wait_for(f"step {told[-1] + STEPS_OF_AN_OUTAGE},")
        first.process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        first.wait_for("stopping")
        first_output = first.end()
        stop_s = time.monotonic() - interrupted
        print(f"stopped in {stop_s:.1f} s")
        last = steps_in(first.run)[-1]
        assert 2 <= last < STEPS - 4, first_output
        second = Launched(runs, seen, SHORT)
        watch = MemoryWatch(second.process.pid)
        second.wait_for(f"step {last + 1},")
        second.kill("headrace.learner", "headrace.generation")
        second.wait_for("held-out")
        second_output = second.end()
        yield Finished(first.run, first_output, second_output, seen, watch.rows())
    finally:
        for launched in filter(None, (first, second)):
            launched.process.kill()


def test_ctrl_c_stops_everything_in_time(finished: Finished) -> None:
    """Within each service's grace period, after which the launcher would have killed it."""
    assert "stopping: " in finished.first and ": killing it" not in finished.first.partition("stopping: ")[2]
    assert "continue with: headrace up" in finished.first


def test_what_is_killed_is_started_again(finished: Finished) -> None:
    assert "redis was killed by SIGKILL: starting it again" in finished.first
    assert "learner was killed by SIGKILL: starting it again" in finished.second
    assert "generation-0 was killed by SIGKILL: starting it again" in finished.second


def test_each_step_is_taken_once(finished: Finished) -> None:
    """Over a stop, and over kills of every process."""
    assert steps_in(finished.run) == list(range(1, STEPS + 1)), finished.second
    versions = [row["weight_version"] for row in rows_of(finished.run, "step")]
    assert versions == sorted(set(versions)), "versions only grow"


def test_a_finished_run_leaves_what_people_need(finished: Finished) -> None:
    run = finished.run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert 0 <= summary["held_out_before"] <= 1 and 0 <= summary["held_out_after"] <= 1
    assert summary["groups"]["trained"] == 4 * STEPS and summary["groups"]["dead"] == 0
    assert summary["weight_pause_ms"]["p95"] >= summary["weight_pause_ms"]["p50"] > 0
    assert summary["tokens_per_s"] > 0 and summary["staleness"]["max"] <= 2
    assert set(summary["lag"]) == {"generation", "learner"}
    assert (run / "reward-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "config.yaml").is_file()
    assert {path.name for path in (run / "logs").iterdir()} >= {"learner.log", "generation-0.log", "redis.log"}
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size == 512
    token = (run / "token").read_text()
    assert not [path for path in (run / "logs").iterdir() if token in path.read_text(errors="replace")]
    assert (run / "token").stat().st_mode & 0o777 == 0o600
    assert "held-out pass@1" in finished.second and f"step {STEPS}," in finished.second


def test_the_engine_and_the_learner_agree(finished: Finished) -> None:
    """At staleness 0 the gap between their log-probabilities is numerics alone."""
    measured = [row for row in rows_of(finished.run, "step") if row["fresh_tokens"]]
    assert measured and max(row["fresh_logprob_gap_p999"] for row in measured) < 1e-4


def test_its_memory_is_what_check_says(finished: Finished) -> None:
    """Of every process, within 15 %; of the small ones within 16 MiB."""
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", SHORT).config
    shape = shape_of(config)
    tokens = config.generation.engine.max_total_tokens or CPU_MAX_TOTAL_TOKENS
    on_device = sum(learner_bytes(shape, config).values()), sum(engine_bytes(shape, config, tokens).values())
    run, replica = host_rows(shape, config, *on_device, (True, True))
    expected = run | replica
    found = finished.memory
    print({what: f"{found[what] >> 20} MiB, expected {expected[what] >> 20}" for what in expected})
    assert set(found) == set(expected)
    for what, num_bytes in expected.items():
        assert found[what] == pytest.approx(num_bytes, rel=0.15, abs=16 << 20), what
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.15)


def test_its_disk_is_what_check_says(finished: Finished) -> None:
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", SHORT).config
    checkpoints, versions, policies = disk_rows(shape_of(config), config, delta_share(config)).values()
    kept = [folder for folder in (finished.run / "checkpoints").iterdir() if folder.is_dir()]
    assert len(kept) == 2
    assert sum(map(num_bytes_in, kept)) == pytest.approx(2 / 3 * checkpoints, rel=0.1)
    assert num_bytes_in(finished.run / "weights") <= versions
    found = sum(num_bytes_in(finished.run / name) for name in ("best", "policy"))
    assert found == pytest.approx(2 / 3 * policies, rel=0.1), "and one that is written"


def num_bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_no_process_is_left(finished: Finished) -> None:
    assert len(finished.processes) > 8, "two launchers' Redis, learner, replica, SGLang and its parts"
    assert not [process for process in finished.processes if is_alive(process)]
