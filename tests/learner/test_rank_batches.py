"""Splitting among ranks: every sample once, similar numbers of tokens, equal numbers of passes; state files."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.loss import PolicyLoss, policy_loss
from headrace.learner.distributed.rank_calls import Call, GatherWeight, TrainStep, WriteState, decode_call, encode_call
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.distributed.state_files import read_state, rows_of, write_state
from headrace.learner.model.packing import Sample
from headrace.learner.training.rank_batches import (
    EMPTY_MICRO_BATCH,
    EMPTY_PASS,
    StepOutcome,
    encode_outcome,
    merge_outcomes,
    split_among_ranks,
)
from tests.learner.test_packing import batches


@given(batches(), st.integers(4, 40), st.integers(1, 5))
def test_every_sample_is_on_one_rank_and_tokens_are_even(samples: list[Sample], budget: int, num_ranks: int) -> None:
    mini_batch = split_among_ranks(samples, budget, num_ranks, is_all_computed=True)
    assert sorted(a for m in mini_batch.micro_batches for a in m.advantages) == sorted(s.advantage for s in samples)
    assert mini_batch.num_sequences == len(samples)
    tokens = [sum(sample.num_tokens for m in share for sample in m.samples) for share in mini_batch.shares]
    longest = max(sample.num_tokens for sample in samples)
    assert sum(tokens) == sum(sample.num_tokens for sample in samples)
    assert max(tokens) - sum(tokens) / num_ranks <= longest
    passes = [mini_batch.of_rank(rank) for rank in range(num_ranks)]
    assert any(own[-1] is not EMPTY_MICRO_BATCH for own in passes)
    assert len({tuple(len(m.passes) for m in own) for own in passes}) == 1, "forward passes are collective"


@given(batches(), st.integers(4, 40), st.integers(1, 5))
def test_samples_of_advantage_0_are_counted_and_not_computed(
    samples: list[Sample], budget: int, num_ranks: int
) -> None:
    """The first sample of these batches has advantage 0."""
    mini_batch = split_among_ranks(samples, budget, num_ranks, is_all_computed=False)
    computed = [row for m in mini_batch.micro_batches for row in m.samples]
    assert len(computed) == max(1, len(samples) - 1)
    assert all(row.advantage != 0 for row in computed) or len(samples) == 1
    assert mini_batch.num_sequences == len(samples)
    assert mini_batch.num_trained_tokens == sum(s.rollout.num_trained_tokens for s in samples)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_empty_micro_batch_has_no_loss_and_no_gradient(aggregation: str) -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    settings = ActorConfig.model_validate({"loss_aggregation": aggregation})
    arrays = [
        torch.from_numpy(a)
        for a in (
            EMPTY_MICRO_BATCH.behaviour_logprobs,
            EMPTY_MICRO_BATCH.advantages,
            EMPTY_MICRO_BATCH.sequence_offsets,
        )
    ]
    behaviour, advantages, offsets = arrays
    found = policy_loss(logprobs, logprobs, behaviour, advantages, logprobs, settings, sequence_offsets=offsets)
    assert (found.loss.item(), found.weight, found.num_tokens) == (0.0, 0, 0)
    found.loss.backward()


def test_outcomes_of_all_ranks_are_merged_in_the_order_of_micro_batches() -> None:
    def loss(number: int) -> PolicyLoss:
        return PolicyLoss(torch.tensor(number / 3), {"x_max": float(number)}, num_tokens=number, weight=number)

    def of_rank(rank: int, counts: list[int]) -> StepOutcome:
        numbers = [[10 * rank + mini + i for i in range(count)] for mini, count in enumerate(counts)]
        return StepOutcome(
            [[loss(n) for n in part] for part in numbers],
            [[torch.full((2,), -n / 7) for n in part] for part in numbers],
        )

    ranks = [of_rank(1, [2, 1]), of_rank(2, [0, 1])]
    found = merge_outcomes([encode_outcome(one) for one in ranks])
    assert [[one.num_tokens for one in part] for part in found.losses] == [[10, 11], [11, 21]]
    assert torch.equal(found.proximal_logprobs[1][1], torch.full((2,), -21 / 7))
    assert found.losses[0][1].loss == torch.tensor(11 / 3) and found.losses[0][1].metrics == {"x_max": 11.0}


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_state_files_are_readable_by_any_number_of_ranks(writers: int, readers: int, sizes: list[int]) -> None:
    whole = {f"exp_avg.{i}": torch.arange(3.0 * size).reshape(size, 3) + i for i, size in enumerate(sizes)}

    def held(rank: int, count: int) -> dict[str, torch.Tensor]:
        rows = {name: rows_of(len(tensor), rank, count) for name, tensor in whole.items()}
        parts = {name: tensor[rows[name].start : rows[name].stop] for name, tensor in whole.items()}
        return parts | {"step.0": torch.tensor(7.0)}

    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), []
        for rank in range(writers):
            tensors = held(rank, writers) | {"random.cpu": torch.full((4,), rank, dtype=torch.uint8)}
            files += list(write_state(folder, tensors, rank, writers))
        assert files == sorted(files) and (files == ["state.safetensors"]) == (writers == 1)
        for rank in range(readers):
            found = read_state(folder, files, rank, readers)
            state = found.pop("random.cpu", None)
            assert (state is None) == (rank >= writers) and (state is None or state[0] == rank)
            expected = held(rank, readers)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@given(st.integers(0, 50), st.integers(1, 9))
def test_rows_are_those_of_fsdp(num_rows: int, count: int) -> None:
    chunks = torch.arange(num_rows).chunk(count) if num_rows else ()
    for rank in range(count):
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(rows_of(num_rows, rank, count)) == expected


@pytest.mark.parametrize("call", [TrainStep(b"{}", [b"x"], 3, {1: 0}), GatherWeight("w"), WriteState("/x")])
def test_a_call_survives_encoding_and_decoding(call: Call) -> None:
    assert decode_call(encode_call(call)) == call


def test_a_single_rank_sends_nothing() -> None:
    ranks = Ranks()
    with ranks.call_others(GatherWeight("w")):
        assert ranks.gather_bytes(b"x") == [b"x"]
    norm = torch.tensor(2.0)
    assert ranks.total_norm(norm) is norm
    ranks.exit_all(0)
    assert np.all(EMPTY_PASS.input_ids == 0)
