"""Packing: every trained token once, within the token budget, whole groups in a mini-batch."""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.config import ActorConfig
from headrace.common.wire import Group, Timings, VersionSpan, check_group
from headrace.learner.model.packing import Pass, Sample, pack, split_mini_batches
from tests.support.factories import make_rollout, make_ticket
from tests.support.segmented import as_episodes, reply_starts


def sample(name: str, prompt: list[int], tokens: list[int], mask: list[int], advantage: float = 1.0) -> Sample:
    trained = sum(mask)
    rollout = make_rollout(
        tokens=tuple(tokens),
        loss_mask=bytes(mask),
        behaviour_logprobs=np.linspace(-1, 0, trained, dtype=np.float32),
        version_spans=[VersionSpan(1, 0, trained)],
    )
    group = Group(make_ticket(name, prompt_tokens=prompt, num_completions=1), [rollout], "r", Timings(0, 0, 0))
    return Sample(group, rollout, advantage, np.zeros(trained, np.int64))


def segment_of_group(sample: Sample, places: list[int]) -> Sample:
    """The sample as one of several segments."""
    group = as_episodes(sample.group, [places])
    return Sample(group, group.rollouts[0], sample.advantage, sample.token_staleness)


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Of rollouts of one or several segments; the n-th has advantage n."""
    samples: list[Sample] = []
    for index in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6))
        rollouts = []
        for _ in range(draw(st.integers(1, 3))):
            tokens = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
            mask = [1] + [draw(st.integers(0, 1)) for _ in tokens[1:]]
            rollouts.append(sample("", prompt, tokens, mask).rollout)
        ticket = make_ticket(f"g{index}", prompt_tokens=prompt, num_completions=len(rollouts))
        cuts = [[place for place in reply_starts(one) if draw(st.booleans())] for one in rollouts]
        group = as_episodes(Group(ticket, rollouts, "r", Timings(0, 0, 0)), cuts)
        check_group(group)
        for rollout in group.rollouts:
            staleness = np.zeros(rollout.num_trained_tokens, np.int64)
            samples.append(Sample(group, rollout, float(len(samples)), staleness))
    return samples


def contexts_in(one: Pass) -> list[tuple[list[int], int]]:
    """Of each trained token of a pass: what it is predicted behind, and the token, found by the layout alone."""
    row, spans = one.input_ids[0], one.layout.spans
    found = []
    for position, target in zip(one.positions.tolist(), one.targets.tolist(), strict=True):
        inside = [(prompt, own) for prompt, own in spans if position in own]
        if inside:
            ((prompt, own),) = inside
            found.append(([*row[prompt], *row[own.start : position + 1]], target))
        else:
            (prompt,) = {prompt for prompt, _ in spans if position == prompt.stop - 1}
            found.append((row[prompt].tolist(), target))
    return found


def contexts_of(sample: Sample) -> list[tuple[list[int], int]]:
    """The same by the rollout's record."""
    found = []
    for segment in sample.rollout.segments:
        tokens, before = segment.tokens.tolist(), list(sample.group.prompt(segment))
        found += [(before + tokens[:i], tokens[i]) for i, trained in enumerate(segment.loss_mask) if trained]
    return found


@given(batches(), st.integers(4, 40))
def test_every_trained_token_is_predicted_once_behind_its_own_context(samples: list[Sample], budget: int) -> None:
    """No other token is predicted, and a rollout's stand together, segment by segment."""
    found = []
    for m in pack(samples, budget):
        contexts = [context for one in m.passes for context in contexts_in(one)]
        assert len(contexts) == m.num_trained_tokens == m.sequence_offsets[-1] and len(m.samples) == m.num_sequences
        for own, advantage, (start, end) in zip(m.samples, m.advantages, pairwise(m.sequence_offsets), strict=True):
            assert contexts[start:end] == contexts_of(own) and advantage == own.advantage
            logprobs = [segment.behaviour_logprobs for segment in own.rollout.segments]
            assert m.behaviour_logprobs[start:end].tolist() == np.concatenate(logprobs).tolist()
            found.append(own.advantage)
    assert sorted(found) == [sample.advantage for sample in samples]


@given(batches(), st.integers(4, 40))
def test_passes_keep_the_budget_unless_one_segment_is_longer(samples: list[Sample], budget: int) -> None:
    for m in pack(samples, budget):
        (widths,) = [one.widths for one in m.samples] if len(m.passes) > 1 else [[budget + 1]]
        assert len(widths) * max(widths) > budget, "several passes are of one rollout that does not fit in one"
        for one in m.passes:
            widths = [len(prompt) + len(own) for prompt, own in one.layout.spans]
            assert len(widths) * max(widths) <= budget or len(widths) == 1
            assert one.input_ids.size == one.layout.num_tokens


def test_positions_by_hand() -> None:
    (m,) = pack([sample("a", [5, 6], [7, 8, 9], [1, 0, 1]), sample("b", [5], [4], [1])], 100)
    (one,) = m.passes
    assert one.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 4]]
    assert one.positions.tolist() == [1, 3, 5]
    assert one.targets.tolist() == [7, 9, 4]
    assert m.sequence_offsets.tolist() == [0, 2, 3]


def test_a_prompt_appears_once_for_all_its_completions() -> None:
    samples = [sample("a", [5, 6], [7], [1]), sample("b", [9], [4], [1]), sample("a", [5, 6], [8, 3], [1, 1])]
    (m,) = pack(samples, 100)
    (one,) = m.passes
    assert one.input_ids.tolist() == [[5, 6, 7, 8, 3, 9, 4]]
    assert one.positions.tolist() == [1, 1, 3, 5] and one.targets.tolist() == [7, 8, 3, 4]
    assert [one.passes[0].input_ids.size for one in pack(samples, 8)] == [5, 2]
    assert [one.passes[0].input_ids.size for one in pack(samples, 4)] == [3, 4, 2]


def test_segments_that_begin_alike_share_their_prompt_and_a_rollouts_tokens_stay_together() -> None:
    """Two rollouts, each of a segment behind the ticket's prompt 5 and one behind 5, 6, 2."""
    rollouts = [sample("a", [5], [6, 2, last], [1, 0, 1]).rollout for last in (7, 8)]
    group = Group(make_ticket("a", prompt_tokens=[5]), rollouts, "r", Timings(0, 0, 0))
    group = as_episodes(group, [[2], [2]])
    (m,) = pack([Sample(group, one, 1.0, np.zeros(2, np.int64)) for one in group.rollouts], 100)
    (one,) = m.passes
    assert one.input_ids.tolist() == [[5, 6, 2, 6, 2, 5, 6, 2, 7, 8]]
    assert one.positions.tolist() == [0, 7, 0, 7] and one.targets.tolist() == [6, 7, 6, 8]
    assert m.sequence_offsets.tolist() == [0, 2, 4] and m.num_sequences == 2


def test_a_rollout_longer_than_the_budget_has_a_micro_batch_of_several_passes() -> None:
    long = segment_of_group(sample("a", [5], [6, 2, 7, 2, 8], [1, 0, 1, 0, 1]), [2, 4])
    assert long.widths == [3, 5, 6]
    counts = {
        budget: [len(m.passes) for m in pack([long, sample("b", [1], [2], [1])], budget)] for budget in (99, 18, 10, 9)
    }
    assert counts == {99: [1], 18: [1, 1], 10: [2, 1], 9: [3, 1]}


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
