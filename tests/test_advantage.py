"""Advantages against hand-computed numbers and their invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import ActorConfig
from services.learner.advantage import group_advantages, normalise_over_tokens, overlong_penalty


def advantages(rewards: list[float], groups: list[int], **changes: object) -> list[float]:
    settings = ActorConfig.model_validate(changes)
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), settings).tolist()


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
    settings = ActorConfig(overlong_tokens=10, overlong_penalty_factor=2.0)
    assert overlong_penalty(torch.tensor([50, 90, 95, 100]), 100, settings).tolist() == [0.0, 0.0, -1.0, -2.0]
    assert overlong_penalty(torch.tensor([100]), 100, ActorConfig()).tolist() == [0.0]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \(B,\)"):
        group_advantages(torch.zeros(2, 2), torch.zeros(2, 2), ActorConfig())
