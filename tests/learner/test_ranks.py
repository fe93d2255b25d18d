"""The trainer on 2 and 3 ranks against 1: equal loss, metrics, gradients and weights; portable checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace.common.config import RunConfig
from headrace.common.wire import encode
from headrace.launcher.estimates.device_memory import learner_bytes
from headrace.launcher.estimates.model_size import shape_in
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.distributed.state_files import read_state
from headrace.learner.model.policy import Policy
from tests.learner.test_segments import cut, make_conversations
from tests.learner.test_trainer import make_batch, make_config, make_trainer
from tests.support.tiny_models import make_checkpoint
from tests.support.trainer_ranks import Job, do, do_on_ranks

CASES: dict[str, dict[str, Any]] = {
    "one_mini_batch": {"actor": {"num_mini_batches": 1}, "learner": {"micro_batch_tokens": 48}},
    "two_and_kl": {
        "actor": {
            "num_mini_batches": 2,
            "kl_coef": 0.1,
            "loss_aggregation": "sequence_mean",
            "ratio_gradient": "token",
        },
        "learner": {"micro_batch_tokens": 48, "gradient_checkpointing": True},
    },
    # Each mini-batch is one group of two completions: one of three ranks has none.
    "a_rank_without_work": {"actor": {"num_mini_batches": 4}, "optimizer": {"max_grad_norm": 1e9}},
    # Rollouts of one to four segments: most are longer than the budget, and take two passes or more.
    "episodes": {"actor": {"num_mini_batches": 2, "kl_coef": 0.1}, "learner": {"micro_batch_tokens": 20}},
    "bfloat16": {"model": {"dtype": "bfloat16"}, "learner": {"micro_batch_tokens": 48}},
    "experts": {"actor": {"num_mini_batches": 2}, "learner": {"micro_batch_tokens": 48}},
    "gated_delta_nets": {"learner": {"micro_batch_tokens": 48, "gradient_checkpointing": True}},
}
KINDS = {"experts": "qwen3_moe", "gated_delta_nets": "qwen3_next"}
"""The kind of the model, for jobs that do not use the demo's policy."""
FLOAT32 = [case for case in CASES if case != "bfloat16"]
NUM_RANKS = [2, 3]
pytestmark = pytest.mark.slow
ITS_OWN = ("_s", "padding_share")
"""Endings of metrics that may differ: durations, and packing."""


@pytest.fixture(scope="module")
def jobs(demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    found = []
    for name, case in CASES.items():
        model = make_checkpoint(tmp_path_factory.mktemp(name), KINDS[name]) if name in KINDS else demo_policy
        trainer = make_trainer(make_config(model))
        groups = (
            cut(make_conversations(trainer), "everywhere") if name == "episodes" else make_batch(trainer, drift=0.1)
        )
        actor, lr = {"group_size": 2} | case.get("actor", {}), {"lr": 1e-4} | case.get("optimizer", {})
        config = make_config(model, **{**case, "actor": actor, "optimizer": lr})
        found.append(Job(name, config.model_dump(mode="json"), [encode(group) for group in groups]))
    return found


@pytest.fixture(scope="module")
def results(jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The results folder of each number of ranks; 2 ranks start from the end of 1, and 3 from the end of 2."""
    root = tmp_path_factory.mktemp("ranks")
    folders = {count: root / str(count) for count in (1, 2, 3)}
    for job in jobs:
        do(job, folders[1] / job.name, Ranks())
    first = jobs[0]
    for count in NUM_RANKS:
        before = folders[count - 1] / ("resumed" if count > 2 else first.name) / "end"
        resumed = Job("resumed", first.config, first.groups, 3 + count, 1, str(before))
        poisoned = Job("poisoned", first.config, first.groups, 0, 2, poisoned_step=0)
        do_on_ranks(count, [*jobs, resumed, poisoned], folders[count])
    return folders


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(folder, [path.name for path in folder.iterdir()])


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The 2-norm of the difference, as one vector."""
    assert one.keys() == other.keys()
    squares = sum((one[name].double() - other[name].double()).pow(2).sum().item() for name in one)
    return float(squares**0.5)


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", ["one_mini_batch", "bfloat16"])
@pytest.mark.parametrize("count", NUM_RANKS)
def test_a_rank_holds_as_many_bytes_as_check_estimates(
    results: dict[int, Path], jobs: list[Job], count: int, case: str
) -> None:
    """Bytes of masters and moments, which are all in the rank's file; gradients take as much as masters."""
    job = next(job for job in jobs if job.name == case)
    config = RunConfig.model_validate(job.config | {"learner": job.config["learner"] | {"num_ranks": count}})
    folder = Path(config.model.path)
    shape = shape_in(folder, json.loads((folder / "config.json").read_text()))
    rows = learner_bytes(shape, config)
    files = sorted((results[count] / case / "end").iterdir())
    held = [
        sum(tensor.nbytes for name, tensor in load_file(file).items() if name.startswith(("master.", "exp_avg")))
        for file in files
    ]
    assert len(held) == count
    expected = rows["masters, float32, its part"] + rows["AdamW's moments, float32, its part"]
    assert max(held) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", NUM_RANKS)
def test_loss_metrics_and_gradients_are_those_of_one_rank(results: dict[int, Path], count: int, case: str) -> None:
    tolerance = {"one_mini_batch": 1e-5, "bfloat16": 2e-2}.get(case, 1e-4)  # several updates are behind the others
    expected, found = (json.loads((results[n] / case / "rows.json").read_text()) for n in (1, count))
    assert expected[0].keys() == found[0].keys() and len(found) == 5
    for name, value in expected[0].items():
        if not name.endswith(ITS_OWN):
            assert found[0][name] == pytest.approx(value, rel=10 * tolerance, abs=1e-6), name
    moments, ours = (part(state_of(results[n] / case / "first"), "exp_avg.") for n in (1, count))
    zero = {name: torch.zeros_like(tensor) for name, tensor in moments.items()}
    assert distance(moments, ours) < tolerance * distance(moments, zero), "the moments are the gradient times 0.1"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", NUM_RANKS)
def test_after_five_steps_the_weights_are_those_of_one_rank(results: dict[int, Path], count: int, case: str) -> None:
    """In bfloat16 AdamW's first steps follow the signs of gradients, and rounding, which depends on the CPU, turns
    some: 0.34 of the way with AMX."""
    expected, found = (load_file(results[n] / case / "weights.safetensors") for n in (1, count))
    assert expected.keys() == found.keys()
    before = load_file(results[1] / case / "before.safetensors")
    moved = distance(expected, before)
    assert moved > 0.01
    assert distance(expected, found) < (1e-3 if case in FLOAT32 else 0.5) * moved
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in expected.items()}


@pytest.mark.parametrize("count", NUM_RANKS)
def test_a_checkpoint_resumes_bit_for_bit_on_another_number_of_ranks(results: dict[int, Path], count: int) -> None:
    before = results[1] / "one_mini_batch" / "end" if count == 2 else results[2] / "resumed" / "end"
    saved, loaded = state_of(before), state_of(results[count] / "resumed" / "start")
    assert len(list((results[count] / "resumed" / "start").iterdir())) == count
    assert saved.keys() == loaded.keys() and any(name.startswith("exp_avg_sq.") for name in saved)
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name


def test_from_one_to_two_to_three_ranks_and_back_to_one(
    results: dict[int, Path], jobs: list[Job], tmp_path: Path
) -> None:
    """Steps 6 and 7 were taken on 2 and on 3 ranks, the eighth on one: the result is as if all had been taken on
    one."""
    one = jobs[0]
    last = Job("back", one.config, one.groups, 7, 1, str(results[3] / "resumed" / "end"))
    straight = Job("straight", one.config, one.groups, 5, 3, str(results[1] / one.name / "end"))
    for job in (last, straight):
        do(job, tmp_path / job.name, Ranks())
    start = part(state_of(results[1] / one.name / "end"), "master.")
    expected, found = (part(state_of(tmp_path / job.name / "end"), "master.") for job in (straight, last))
    assert distance(expected, found) < 1e-3 * distance(expected, start)


@pytest.mark.parametrize("count", NUM_RANKS)
def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(results: dict[int, Path], count: int) -> None:
    folder = results[count] / "poisoned"
    skipped, taken = json.loads((folder / "rows.json").read_text())
    assert (skipped["skipped_updates"], taken["skipped_updates"]) == (1.0, 0.0)
    start, first, end = (part(state_of(folder / at), "master.") for at in ("start", "first", "end"))
    assert distance(start, first) == 0.0 and distance(first, end) > 0.0


def test_a_single_rank_shards_nothing(demo_policy: Path) -> None:
    config = make_config(demo_policy)
    policy = Policy(config.model, config.learner)
    assert policy.ranks.is_alone and not policy.sharded
    assert not torch.distributed.is_initialized()
