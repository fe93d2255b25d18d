"""The whole stack by its one command: a short run with the real SGLang, and what it leaves."""

import json
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
from tests.support.fake_services import ROOT
from tests.support.launched_run import Launched, is_alive, rows_of, short_run, steps_in
from tests.support.memory_watch import MemoryWatch

STEPS = 6
SHORT = short_run(STEPS)


class Finished(NamedTuple):
    run: Path
    output: str
    """The launcher's."""
    processes: set[psutil.Process]
    """Every process of the launcher that was seen."""
    memory: dict[str, int]
    """The most that its processes took, by the rows of `headrace check`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    seen = set[psutil.Process]()
    launched = Launched(tmp_path_factory.mktemp("runs"), seen, SHORT)
    try:
        watch = MemoryWatch(launched.process.pid)
        launched.wait_for("step 1,")
        yield Finished(launched.run, launched.end(), seen, watch.rows())
    finally:
        launched.process.kill()


def test_each_step_is_taken_once(finished: Finished) -> None:
    assert steps_in(finished.run) == list(range(1, STEPS + 1)), finished.output


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
    assert "held-out pass@1" in finished.output and f"step {STEPS}," in finished.output


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
    assert len(finished.processes) > 6, "Redis, learner, control, replica, reward worker, SGLang and its parts"
    assert not [process for process in finished.processes if is_alive(process)]
