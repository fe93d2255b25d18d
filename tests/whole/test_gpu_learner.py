"""benchmarks/learner/gpu_learner.sh on a CPU with a tiny model. Neither CUDA nor the part `learner`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guard import GUARD_S
from tests.support.replay import ROOT

SCRIPT = ROOT / "benchmarks" / "learner" / "gpu_learner.sh"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_the_script_says_what_it_is_for(tmp_path: Path) -> None:
    parts = ["prepare", "float32", "bfloat16", "resume", "check"]
    command = [str(SCRIPT), "--shape", "tiny", "--folder", str(tmp_path), *parts]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=GUARD_S)
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr[-4000:]
    for dtype in ("float32", "bfloat16"):
        assert re.search(rf"{dtype}: peak of memory while 4 steps ran: [\d,]+ MiB", told)
        assert [int(step) for step in re.findall(rf"{dtype}: step (\d) .*gradient_norm", told)] == [1, 2, 3, 4]
    assert "bfloat16: stopped after 2 of 4 steps and resumed: policies are bit for bit the same" in told
    assert told.count("AdamW's moments") == 2, "headrace check's rows, for both"
    assert re.findall(r"gpu_learner.sh: (\w+) took", told) == parts


def test_a_part_that_it_does_not_have_is_refused() -> None:
    ended = subprocess.run([str(SCRIPT), "everything"], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 2 and "everything is none of" in ended.stderr


def test_what_is_not_installed_is_listed_before_anything_starts(tmp_path: Path) -> None:
    """As on a machine that has torch and transformers alone: a Python that finds nothing else."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    ended = subprocess.run([str(SCRIPT)], env=ENVIRONMENT | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert ended.returncode == 1 and "not installed here: torch transformers blake3" in ended.stderr
    assert "prepare took" not in ended.stdout
