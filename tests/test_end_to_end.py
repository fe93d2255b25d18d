"""The whole stack by its one command: a short run with the real SGLang, ended, stopped, and taken up again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SHORT = ["learner.steps=4", "evaluation.num_prompts=16", "evaluation.interval_steps=2", "learner.groups_per_step=4"]


def headrace_up(runs: Path, *overrides: str) -> subprocess.Popen[str]:
    chosen = [part for override in (*SHORT, *overrides) for part in ("--set", override)]
    command = [sys.executable, "-m", "services.launcher", "up", "configs/tiny-cpu.yaml", "--run", "short"]
    return subprocess.Popen(
        [*command, "--runs-folder", str(runs), *chosen],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_in(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "step"]


def versions_in(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["version"] for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of four steps, stopped by a Ctrl-C after its first ones and taken up again."""
    runs = tmp_path_factory.mktemp("runs")
    process = headrace_up(runs)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 2," in line:
            process.send_signal(signal.SIGINT)
    output = "".join(lines)
    assert process.wait(60) == 0, output
    assert "stopping" in output and "go on with" in output, output
    stopped_at = steps_in(runs / "short")[-1]
    assert 2 <= stopped_at < 4, output
    again = headrace_up(runs)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    return runs / "short", output


def test_a_stopped_run_goes_on_from_its_last_step(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert steps_in(run) == [1, 2, 3, 4], output
    versions = versions_in(run)
    assert versions == sorted(set(versions)), "versions only grow, over a resume too"


def test_a_finished_run_leaves_what_people_need(finished: tuple[Path, str]) -> None:
    run, output = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 <= summary["held_out_before"] <= 1 and 0 <= summary["held_out_after"] <= 1
    assert summary["groups"]["trained"] == 16 and summary["groups"]["dead"] == 0
    assert summary["weight_pause_ms"]["p95"] >= summary["weight_pause_ms"]["p50"] > 0
    assert summary["tokens_per_s"] > 0 and summary["staleness"]["max"] <= 2
    assert set(summary["lag"]) == {"generation", "learner"}
    assert (run / "reward-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "config.yaml").is_file()
    assert {path.name for path in (run / "logs").iterdir()} >= {"learner.log", "generation-0.log", "redis.log"}
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size == 512
    assert (run / "token").stat().st_mode & 0o777 == 0o600
    assert "held-out pass@1" in output and "step 4," in output


def test_the_engine_and_the_learner_agree(finished: tuple[Path, str]) -> None:
    """At staleness 0 the gap between their log-probabilities is numerics alone."""
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["fresh_logprob_gap_max"] for row in rows if "fresh_logprob_gap_max" in row]
    assert gaps and max(gaps) < 1e-4


def test_no_process_is_left(finished: tuple[Path, str]) -> None:
    left = [p for p in psutil.process_iter(["cmdline"]) if str(finished[0].parent) in " ".join(p.info["cmdline"] or [])]
    assert not left
