"""Packing: every trained token once, within the token budget, whole groups in a mini-batch."""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.config import ActorConfig
from headrace.common.wire import Group, Timings, VersionSpan
from headrace.learner.model.packing import Sample, pack, split_mini_batches
from tests.support.factories import make_rollout, make_ticket


def sample(name: str, prompt: list[int], tokens: list[int], mask: list[int], advantage: float = 1.0) -> Sample:
    trained = sum(mask)
    rollout = make_rollout(
        tokens=tuple(tokens),
        loss_mask=bytes(mask),
        behaviour_logprobs=np.linspace(-1, 0, trained, dtype=np.float32),
        version_spans=[VersionSpan(1, 0, trained)],
    )
    group = Group(make_ticket(name, prompt_tokens=prompt, num_completions=1), [rollout], "r", Timings(0, 0, 0))
    return Sample(group, rollout, rollout.segments[0], advantage, np.zeros(trained, np.int64))


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    samples: list[Sample] = []
    for group in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6))
        for _ in range(draw(st.integers(1, 3))):
            tokens = draw(st.lists(st.integers(1, 99), min_size=1, max_size=8))
            mask = [1] + [draw(st.integers(0, 1)) for _ in tokens[1:]]
            samples.append(sample(f"g{group}", prompt, tokens, mask, advantage=float(len(samples))))
    return samples


@given(batches(), st.integers(4, 40))
def test_every_trained_token_is_predicted_once_within_the_budget(samples: list[Sample], budget: int) -> None:
    micro_batches = pack(samples, budget)
    found = []
    for m in micro_batches:
        assert m.num_sequences * max(s.num_tokens for s in m.rows) <= budget or m.num_sequences == 1
        assert m.input_ids.size == m.layout.num_tokens
        for row, (start, end) in enumerate(pairwise(m.sequence_offsets)):
            seen, prompt_end = m.rows[row].segment.tokens.tolist(), len(m.rows[row].group.ticket.prompt_tokens)
            first = m.layout.spans[row][1].start
            assert m.input_ids[0, first : first + len(seen)].tolist() == seen
            for place, target in zip(m.positions[start:end], m.targets[start:end], strict=True):
                sequence = [*m.rows[row].group.ticket.prompt_tokens, *seen]
                in_sequence = prompt_end + place - first if place >= first else prompt_end - 1
                assert m.input_ids[0, place] == sequence[in_sequence] and sequence[in_sequence + 1] == target
            found.append((m.advantages[row], m.targets[start:end].tolist(), m.behaviour_logprobs[start:end].tolist()))
    expected = [
        (
            s.advantage,
            [token for token, bit in zip(s.segment.tokens.tolist(), s.segment.loss_mask, strict=True) if bit],
            s.segment.behaviour_logprobs.tolist(),
        )
        for s in samples
    ]
    assert sorted(found) == sorted(expected)


def test_positions_by_hand() -> None:
    (m,) = pack([sample("a", [5, 6], [7, 8, 9], [1, 0, 1]), sample("b", [5], [4], [1])], 100)
    assert m.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 4]]
    assert m.positions.tolist() == [1, 3, 5]
    assert m.targets.tolist() == [7, 9, 4]
    assert m.sequence_offsets.tolist() == [0, 2, 3]


def test_a_prompt_appears_once_for_all_its_completions() -> None:
    samples = [sample("a", [5, 6], [7], [1]), sample("b", [9], [4], [1]), sample("a", [5, 6], [8, 3], [1, 1])]
    (m,) = pack(samples, 100)
    assert m.input_ids.tolist() == [[5, 6, 7, 8, 3, 9, 4]]
    assert m.positions.tolist() == [1, 1, 3, 5] and m.targets.tolist() == [7, 8, 3, 4]
    assert [one.input_ids.size for one in pack(samples, 8)] == [5, 2]
    assert [one.input_ids.size for one in pack(samples, 4)] == [3, 4, 2]


def test_a_group_stays_together_and_padding_stays_small() -> None:
    samples = [sample(f"g{i % 4}", [1], [2] * (1 + 5 * (i % 4)), [1] * (1 + 5 * (i % 4))) for i in range(16)]
    order = [length for m in pack(samples, 34) for length in np.diff(m.sequence_offsets).tolist()]
    assert order == [16] * 4 + [11] * 4 + [6] * 4 + [1] * 4


@given(batches(), st.integers(1, 4))
def test_mini_batches_are_whole_groups_of_even_size(samples: list[Sample], num_mini_batches: int) -> None:
    parts = split_mini_batches(samples, ActorConfig(num_mini_batches=num_mini_batches), "seed")
    names = [{s.group.ticket.id for s in part} for part in parts]
    assert len(parts) == num_mini_batches
    assert sum(len(part) for part in parts) == len(samples)
    assert len(set().union(*names)) == sum(len(part) for part in names)
    assert max(map(len, names)) - min(map(len, names)) <= 1


@given(batches(), st.integers(1, 4))
def test_completions_are_distributed_evenly_in_total_and_per_group(samples: list[Sample], count: int) -> None:
    settings = ActorConfig(num_mini_batches=count, mini_batch_split="completions")
    parts = split_mini_batches(samples, settings, "seed")
    assert sorted(s.advantage for part in parts for s in part) == sorted(s.advantage for s in samples)
    for name in (None, *(s.group.ticket.id for s in samples)):
        sizes = [sum(name in (None, s.group.ticket.id) for s in part) for part in parts]
        assert len(sizes) == count and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("split", ["groups", "completions"])
def test_the_split_depends_only_on_the_seed(split: Literal["groups", "completions"]) -> None:
    samples = [sample(f"g{i}", [1], [2], [1]) for i in range(8)]
    settings = ActorConfig(num_mini_batches=2, mini_batch_split=split)
    one, again, other = (split_mini_batches(samples, settings, seed) for seed in ("0-1", "0-1", "0-2"))
    assert one == again
    assert [s.group.ticket.id for s in one[0]] != [s.group.ticket.id for s in other[0]]
