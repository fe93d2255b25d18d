"""Advantages against hand-computed numbers and their invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.advantage import group_advantages, normalise_over_tokens, overlong_penalty


def advantages(rewards: list[float], groups: list[int], **changes: object) -> list[float]:
    actor = ActorConfig.model_validate(changes)
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), actor).tolist()


def test_golden_group_normalisation() -> None:
    result = advantages([1, 0, 0, 1], [7, 7, 7, 7], reward_bias=-0.5, reward_scaling=10.0)
    assert result == pytest.approx([0.8660239038, -0.8660239038, -0.8660239038, 0.8660239038], abs=1e-9)


def test_grouped_by_id_not_by_position() -> None:
    interleaved = advantages([1, 5, 0, 7], [3, 9, 3, 9])
    together = advantages([1, 0, 5, 7], [3, 3, 9, 9])
    assert interleaved == pytest.approx([together[0], together[2], together[1], together[3]])


def test_leave_one_out_mean_without_deviation() -> None:
    result = advantages([1, 0, 0, 2], [0] * 4, advantage_mean="leave_one_out", advantage_std="none")
    assert result == pytest.approx([1 - 2 / 3, -1.0, -1.0, 2 - 1 / 3])


def test_batch_level_mean_and_deviation() -> None:
    result = advantages([1, 0, 0, 0], [0, 0, 1, 1], advantage_mean="batch", advantage_std="batch")
    assert result == pytest.approx([0.75 / (0.5 + 1e-5), *([-0.25 / (0.5 + 1e-5)] * 3)])


def test_rewards_are_clipped_after_bias_and_scale() -> None:
    result = advantages([9, 0], [0, 0], reward_scaling=10.0, advantage_std="none", advantage_mean="none")
    assert result == [20.0, 0.0]


@given(st.floats(-10, 10), st.integers(2, 9), st.sampled_from(["group", "leave_one_out"]))
def test_equal_rewards_give_exactly_zero(reward: float, size: int, mean: str) -> None:
    assert advantages([reward] * size + [0, 1], [0] * size + [1, 1], advantage_mean=mean)[:size] == [0.0] * size


def test_token_weighted_batch_normalisation() -> None:
    result = normalise_over_tokens(torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([3, 1]))
    spread = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    expected = (spread - spread.mean()) / (spread.std() + 1e-5)
    assert result.tolist() == pytest.approx([expected[0].item(), expected[3].item()])
    assert normalise_over_tokens(torch.tensor([2.0]), torch.tensor([1])).tolist() == [0.0]


def test_overlong_penalty_is_linear_to_the_limit() -> None:
    actor = ActorConfig(overlong_tokens=10, overlong_penalty_factor=2.0)
    assert overlong_penalty(torch.tensor([50, 90, 95, 100]), torch.full((4,), 100), actor).tolist() == [
        0.0,
        0.0,
        -1.0,
        -2.0,
    ]
    assert overlong_penalty(torch.tensor([100]), torch.tensor([100]), ActorConfig()).tolist() == [0.0]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \(B,\)"):
        group_advantages(torch.zeros(2, 2), torch.zeros(2, 2), ActorConfig())


MEANS, STDS = ["group", "leave_one_out", "batch", "none"], ["group", "batch", "none"]
rewards_of_groups = st.lists(
    st.lists(st.sampled_from([0.0, 0.3, 1.0, -2.5, 1 / 3]), min_size=4, max_size=4), min_size=1, max_size=5
)


@given(rewards_of_groups, st.sampled_from(MEANS), st.sampled_from(STDS), st.sampled_from([0.0, -0.5]))
def test_no_combination_of_mean_and_deviation_diverges(
    groups: list[list[float]], mean: str, std: str, bias: float
) -> None:
    """Rounding, in float64 or float32, does not make a uniform group anything else either."""
    spread = [[reward * (1 + 3e-16 * (i % 2)) for i, reward in enumerate(group)] for group in groups]
    rounded = [torch.tensor(group, dtype=torch.float32).double().tolist()[:2] + group[2:] for group in groups]
    for variant in (groups, spread, rounded):
        flat, ids = [r for group in variant for r in group], [i for i, group in enumerate(groups) for _ in group]
        found = advantages(flat, ids, advantage_mean=mean, advantage_std=std, reward_bias=bias)
        scale = 1.0 if std == "none" else 1 / (0.1 + 1e-5)  # the least deviation of rewards that differ
        assert max(map(abs, found)) <= 2 * 3.5 * scale
        for index, group in enumerate(groups):
            of_group = found[4 * index : 4 * index + 4]
            if len(set(group)) == 1 and (std == "group" or mean in ("group", "leave_one_out")):
                assert of_group == [0.0] * 4
        if len({r for group in groups for r in group}) == 1 and std == "batch":
            assert found == [0.0] * len(found)


def test_a_uniform_group_with_the_batch_mean_has_bounded_advantages() -> None:
    """Before, its advantages were 33,000 to 70,000: the rounding error of the mean of others, divided by 1e-5."""
    found = advantages([1, 1, 1, 0], [0, 0, 1, 1], advantage_mean="batch", advantage_std="group")
    assert found[:2] == [0.0, 0.0] and found[2] == pytest.approx(0.25 / (0.5**0.5 + 1e-5))
    assert advantages([2, 2, 2, 2], [0, 0, 1, 1], advantage_mean="none", advantage_std="batch") == [0.0] * 4
    assert advantages([2, 2, 1, 1], [0, 0, 1, 1], advantage_mean="none", advantage_std="none") == [2, 2, 1, 1]


def test_rewards_that_the_clip_makes_equal_are_uniform() -> None:
    assert advantages([30, 40], [0, 0], advantage_mean="none", advantage_std="group") == [0.0, 0.0]
