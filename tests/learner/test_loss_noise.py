"""The loss when engine and learner differ by numerics, and when a sequence has diverged."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.loss import policy_loss
from tests.learner.test_loss import OFFSETS, actor, reference_loss, variants

NUM_SEQUENCES = 400
PAPER_TO_THE_LETTER = {"preset": "paper", "use_decoupled_loss": False}


def zero_gradient_share(given: dict[str, object], sigma: float, drift: float = 0.0) -> float:
    """The share of zero gradients among 400 sequences of 100 to 2,000 tokens with advantages of both signs, sampled by
    an engine whose log-probabilities differ from the proximal policy's by noise of RMS `sigma`. `drift`: the difference
    of each sequence's mean, policy minus proximal."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 2001, (NUM_SEQUENCES,), generator=generator)
    total = int(lengths.sum())
    proximal = -torch.rand(total, generator=generator) * 3 - 0.5
    behaviour = proximal + sigma * torch.randn(total, generator=generator)
    moved = drift * torch.randn(NUM_SEQUENCES, generator=generator).repeat_interleave(lengths)
    policy = (proximal + moved).requires_grad_()
    advantages = torch.randn(NUM_SEQUENCES, generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    actor_settings = ActorConfig.model_validate(given)
    mask = torch.ones(total)
    policy_loss(policy, proximal, behaviour, advantages, mask, actor_settings, sequence_offsets=offsets).loss.backward()
    assert policy.grad is not None
    return sum(not bool(part.any()) for part in policy.grad.split(lengths.tolist())) / NUM_SEQUENCES


@pytest.mark.parametrize("sigma", [0.02, 0.04])
@pytest.mark.parametrize("given", [{"preset": "paper"}, {"preset": "baseline"}, {"preset": "token"}, {}], ids=str)
def test_numerics_alone_zero_no_sequence_with_any_preset(given: dict[str, object], sigma: float) -> None:
    assert zero_gradient_share(given, sigma) == 0.0
    assert zero_gradient_share(given, sigma, drift=5e-5) == 0.0, "a policy that has hardly moved keeps its gradient too"


@pytest.mark.parametrize(("sigma", "lost"), [(0.02, 0.3), (0.04, 0.4)])
def test_the_papers_ratio_against_the_engine_loses_sequences_to_the_same_noise(sigma: float, lost: float) -> None:
    """The former preset and what `docs/algorithm.md` says of it; this shows that the simulation can fail."""
    assert zero_gradient_share(PAPER_TO_THE_LETTER, 0.0) == 0.0
    assert zero_gradient_share(PAPER_TO_THE_LETTER, sigma) == pytest.approx(lost, abs=0.05)


def test_the_papers_clip_still_acts_on_sequences_that_the_policy_has_moved() -> None:
    assert zero_gradient_share({"preset": "paper"}, 0.02, drift=0.01) == pytest.approx(0.5, abs=0.1)


# --- one sequence has diverged: log-probabilities as far apart as float32 allows ---


def gradients(first: list[Tensor], variant: ActorConfig, dtype: torch.dtype) -> tuple[float, Tensor, dict[str, float]]:
    """Gradients of two sequences, the second near its proximal policy; `first`: policy, proximal and behaviour of the
    first."""
    second = [torch.tensor(values, dtype=dtype) for values in ([-1.2, -2.0], [-1.3, -1.9], [-1.25, -1.95])]
    policy, proximal, behaviour = (torch.cat([a.to(dtype), b]) for a, b in zip(first, second, strict=True))
    policy.requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5], dtype=dtype) * (-1 if variant.group_size % 2 else 1)
    result = policy_loss(policy, proximal, behaviour, advantages, torch.ones(5), variant, sequence_offsets=OFFSETS)
    result.loss.backward()
    assert policy.grad is not None
    return result.loss.item(), policy.grad, result.metrics


far = st.sampled_from([0.0, -1e-6, -3.0, -90.0, -1e3, -1e9, -1e30])


@settings(max_examples=200)
@given(st.lists(st.tuples(far, far, far), min_size=3, max_size=3), variants, st.sampled_from([7, 8]))
def test_a_diverged_sequence_does_not_block_the_update(
    rows: list[tuple[float, float, float]], variant: ActorConfig, size: int
) -> None:
    """Everything is finite in float32, and the other sequence's gradient is the same as beside a normal one."""
    variant = variant.model_copy(update={"group_size": size})
    runaway = [torch.tensor(column) for column in zip(*rows, strict=True)]
    loss, gradient, metrics = gradients(runaway, variant, torch.float32)
    assert math.isfinite(loss) and bool(gradient.isfinite().all())
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    calm = [torch.tensor([-1.0, -1.0, -1.0])] * 3
    torch.testing.assert_close(gradient[3:], gradients(calm, variant, torch.float32)[1][3:])
    assert math.isfinite(float(torch.linalg.vector_norm(gradient))), (
        "the norm that decides whether the update is skipped"
    )


@settings(max_examples=100)
@given(
    st.lists(st.tuples(*[st.floats(-19.0, 0.0)] * 3), min_size=3, max_size=3),
    variants.filter(lambda one: one.trust_region != "second_moment"),
)
def test_inside_the_clamp_loss_and_gradients_are_as_without_it(
    rows: list[tuple[float, float, float]], variant: ActorConfig
) -> None:
    """Compared with the reference, which has no clamp, and with its central differences where the gradient is the
    loss's own."""
    variant = variant.model_copy(update={"ratio_gradient": "sequence", "group_size": 8})
    columns = [list(column) for column in zip(*rows, strict=True)]
    loss, gradient, _ = gradients(
        [torch.tensor(column, dtype=torch.float64) for column in columns], variant, torch.float64
    )

    def expected(policy: list[float]) -> float:
        sequences = [
            {"policy": policy, "proximal": columns[1], "behaviour": columns[2], "advantages": [1.0] * 3},
            {"policy": [-1.2, -2.0], "proximal": [-1.3, -1.9], "behaviour": [-1.25, -1.95], "advantages": [-0.5] * 2},
        ]
        return reference_loss(sequences, variant)

    assert loss == pytest.approx(expected(columns[0]), rel=1e-9, abs=1e-12)
    step = 1e-6
    for place in range(3):
        up, down = ([value + sign * step * (i == place) for i, value in enumerate(columns[0])] for sign in (1, -1))
        slopes = [(expected(up) - loss) / step, (loss - expected(down)) / step]
        if slopes[0] == pytest.approx(slopes[1], rel=1e-3, abs=1e-6):  # not at the clip's corner
            assert gradient[place].item() == pytest.approx(sum(slopes) / 2, rel=1e-3, abs=1e-5)


def test_outside_the_clamp_there_is_no_gradient() -> None:
    for level in ("sequence", "token"):
        for how in ("sequence", "token"):
            variant = actor(
                importance_sampling_level=level, ratio_gradient=how, behav_imp_weight_mode="disabled", group_size=7
            )
            first = [torch.tensor([0.0, 0.0, 0.0]), torch.full((3,), -21.0), torch.full((3,), -21.0)]
            _, gradient, _ = gradients(first, variant, torch.float64)
            assert gradient[:3].tolist() == [0.0] * 3 and bool(gradient[3:].all())
