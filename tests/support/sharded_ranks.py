"""Ranks that examine how they are sharded, as torchrun starts them: each writes its findings.

torchrun --standalone --nproc-per-node 2 -m tests.support.sharded_ranks experts|memory FOLDER [MODEL]
"""

import json
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.learner.distributed.fsdp import shard
from headrace.learner.distributed.join import join
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.model.policy import Policy, load_model
from headrace.learner.training.leader import build_trainer, run_follower  # noqa: F401 - imported before memory is measured
from tests.support.guard import GUARD_S

NUM_EXPERTS, SIZE = 3, 4


class Layer(nn.Module):
    """Experts that are separate modules; a forward pass uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(NUM_EXPERTS))

    def forward(self, hidden: Tensor, expert: int) -> Tensor:
        output: Tensor = self.experts[expert](hidden)
        return output


class Model(nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SIZE))
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, expert: int) -> Tensor:
        hidden = self.scale * torch.arange(1.0, SIZE + 1)
        for layer in self.layers:
            hidden = layer(hidden, expert)
        return hidden.sum()


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def experts(ranks: Ranks, folder: Path) -> None:
    """Each rank uses the expert of its number in every layer; the last expert is unused. Writes the whole gradients."""
    model = make_model()
    if ranks.rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # rank 0's values are what counts
    shard(model, model, ranks, torch.device("cpu"), torch.float32)
    model(ranks.rank).backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        found[name] = parameter.grad.full_tensor().tolist()
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


def memory(ranks: Ranks, folder: Path) -> None:
    """Writes by how many bytes the rank's peak memory has grown while it loaded the model."""
    settings, learner = ModelConfig(path=sys.argv[3], dtype="float32"), LearnerConfig(device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load_model(settings, learner, ranks) if ranks.rank == 0 else None
    policy = Policy(settings, learner, ranks, loaded)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    num_bytes = sum(4 * parameter.numel() for parameter in policy.model.parameters())
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"grown": grown, "model": num_bytes}))


if __name__ == "__main__":
    {"experts": experts, "memory": memory}[sys.argv[1]](join("cpu", GUARD_S), Path(sys.argv[2]))
