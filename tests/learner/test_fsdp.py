"""Sharded models with special needs: experts that a rank does not use, and a model that only one rank has read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.guard import GUARD_S
from tests.support.replay import ROOT
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


def test_an_expert_that_a_rank_does_not_use_does_not_block_the_others(tmp_path: Path) -> None:
    """Gradients are the sums over ranks: of a rank's own expert, and of the layers that all ranks use."""
    alone = make_model()
    (alone(0) + alone(1)).backward()
    for found in on_two_ranks("experts", tmp_path):
        for name, parameter in alone.named_parameters():
            expected = torch.zeros(SIZE, SIZE) if parameter.grad is None else parameter.grad
            assert torch.allclose(torch.tensor(found[name]), expected), name


def test_only_one_rank_reads_the_model(tmp_path: Path) -> None:
    """The other rank never holds more than its rows and a little more; the rows are 0.5."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 32}
    model = make_checkpoint(tmp_path / "model", "qwen3", **sizes)
    reader, other = on_two_ranks("memory", tmp_path, str(model))
    assert other["model"] == reader["model"] > 100e6
    assert reader["grown"] > 0.9 * reader["model"]
    assert 0.4 * other["model"] < other["grown"] < 0.8 * other["model"]
