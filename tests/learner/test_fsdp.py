"""The policy on ranks of its own kind: experts that a rank does not use, and a model that one rank alone has read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.guard import GUARD_S
from tests.support.replaying import ROOT
from tests.support.sharded_ranks import SIZE, make_model
from tests.support.tiny_models import make_checkpoint

pytestmark = pytest.mark.slow


def on_two_ranks(what: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.support.sharded_ranks", what, str(folder), *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=GUARD_S
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_an_expert_that_a_rank_does_not_use_hangs_nobody(tmp_path: Path) -> None:
    """Gradients are the sums of what each rank has: of its own expert, and of what all use."""
    alone = make_model()
    (alone(0) + alone(1)).backward()
    for found in on_two_ranks("experts", tmp_path):
        for name, parameter in alone.named_parameters():
            expected = torch.zeros(SIZE, SIZE) if parameter.grad is None else parameter.grad
            assert torch.allclose(torch.tensor(found[name]), expected), name


def test_one_rank_alone_reads_the_model(tmp_path: Path) -> None:
    """The other never holds more than its rows and a little more; 0.5 is what the rows are."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 32}
    model = make_checkpoint(tmp_path / "model", "qwen3", **sizes)
    reader, other = on_two_ranks("memory", tmp_path, str(model))
    assert other["model"] == reader["model"] > 100e6
    assert reader["grown"] > 0.9 * reader["model"]
    assert 0.4 * other["model"] < other["grown"] < 0.8 * other["model"]
