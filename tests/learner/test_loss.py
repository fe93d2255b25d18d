"""The loss against the golden numbers, an independent reference, and its invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.loss import PolicyLoss, policy_loss, reference_kl

SEED = {
    "importance_sampling_level": "sequence",
    "ratio_gradient": "sequence",
    "behaviour_clip": False,
    "eps_clip": 0.4,
    "eps_clip_higher": None,
    "behav_imp_weight_cap": 5.0,
    "behav_imp_weight_mode": "token_mask",
    "loss_aggregation": "token_mean",
}
BEHAVIOUR = [-1.0, -2.0, -3.0, -0.5, -1.5]
PROXIMAL = [-0.9, -2.2, -1.2, -0.6, -1.4]
POLICY = [-0.7, -2.1, -1.0, -1.2, -2.0]
OFFSETS = torch.tensor([0, 3, 5])


def actor(**changes: object) -> ActorConfig:
    return ActorConfig.model_validate(SEED | changes)


def packed(settings: ActorConfig) -> tuple[PolicyLoss, Tensor]:
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    proximal, behaviour = (torch.tensor(values, dtype=torch.float64) for values in (PROXIMAL, BEHAVIOUR))
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    result = policy_loss(policy, proximal, behaviour, advantages, torch.ones(5), settings, sequence_offsets=OFFSETS)
    result.loss.backward()
    assert policy.grad is not None
    return result, policy.grad


COUPLED: dict[str, object] = {"use_decoupled_loss": False}
GOLDEN = [
    ({}, -0.2133632542),
    ({"behav_imp_weight_mode": "token_truncate"}, -1.3947236671),
    ({"behav_imp_weight_mode": "sequence_truncate"}, -1.0092054504),
    ({"behav_imp_weight_mode": "sequence_mask"}, -1.0092054504),
    ({"behav_imp_weight_mode": "disabled"}, -0.4688162477),
    ({"importance_sampling_level": "token"}, -0.2097382448),
    ({"loss_aggregation": "sequence_mean", "behav_imp_weight_mode": "disabled"}, -0.2906802064),
    (
        {
            "loss_aggregation": "sequence_mean",
            "behav_imp_weight_mode": "disabled",
            "eps_clip": 3e-4,
            "eps_clip_higher": 4e-4,
        },
        -0.00035,
    ),
    ({"loss_aggregation": "sequence_mean"}, -0.0773022950),
    ({"loss_aggregation": "sequence_mean", "behav_imp_weight_mode": "sequence_mask"}, -0.7410045420),
    ({"ratio_gradient": "token"}, -0.2133632542),
    ({"behaviour_clip": True}, 0.2412010003),
    ({"behav_imp_weight_mode": "token_band"}, -0.2133632542),
    ({"trust_region": "soft"}, -0.2514970633),
    (
        {"trust_region": "second_moment", "use_decoupled_loss": False, "importance_sampling_level": "token"},
        -0.1809674836,
    ),
]


@pytest.mark.parametrize(("changes", "expected"), GOLDEN)
def test_golden_losses(changes: dict[str, object], expected: float) -> None:
    result, _ = packed(actor(**changes))
    assert result.loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [-0.1515214182] * 3 + [0.0, 0.0]),
        ({"ratio_gradient": "token"}, [-0.2611210344, -0.1934432201, 0.0, 0.0, 0.0]),
        ({"behaviour_clip": True}, [0.0] * 5),
    ],
)
def test_golden_gradients(changes: dict[str, object], expected: list[float]) -> None:
    _, gradient = packed(actor(**changes))
    assert gradient.tolist() == pytest.approx(expected, abs=1e-9)


def test_icepop_masks_weights_on_both_sides_of_its_band() -> None:
    gaps = [math.log(0.49), math.log(0.51), math.log(4.99), math.log(5.01)]
    behaviour = torch.full((1, 4), -6.0, dtype=torch.float64)
    proximal = behaviour + torch.tensor([gaps], dtype=torch.float64)
    settings = actor(behav_imp_weight_mode="token_band")
    result = policy_loss(proximal, proximal, behaviour, -torch.ones(1, 4), torch.ones(1, 4), settings)
    assert result.loss.item() == pytest.approx((0.51 + 4.99) / 4)
    assert result.metrics["behaviour_mask_fraction"] == 0.5


@pytest.mark.parametrize(("advantage", "tau"), [(1.0, 1.0), (-1.0, 1.05)])
def test_the_soft_gate_has_the_papers_slope(advantage: float, tau: float) -> None:
    """dL/dlog π = −A·ρ·4σ(1 − σ), σ = σ(τ(ρ − 1)) (arXiv 2511.20347, eq. 7 and 8)."""
    settings = actor(trust_region="soft", importance_sampling_level="token", behav_imp_weight_mode="disabled")
    policy = torch.tensor([[0.0, math.log(3.0), math.log(0.1)]], dtype=torch.float64, requires_grad=True)
    other = torch.zeros(1, 3, dtype=torch.float64)
    policy_loss(policy, other, other, torch.full((1, 3), advantage), torch.ones(1, 3), settings).loss.backward()
    sigmas = [1 / (1 + math.exp(-tau * (ratio - 1))) for ratio in (1.0, 3.0, 0.1)]
    slopes = [4 * ratio * s * (1 - s) for ratio, s in zip((1.0, 3.0, 0.1), sigmas, strict=True)]
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx([-advantage * slope / 3 for slope in slopes])


def test_m2po_masks_the_largest_log_ratios_of_tokens_that_moved_with_their_advantage() -> None:
    """Squares 0.01, 0.09 and 0.25 of A > 0: without the largest the mean is 0.05, without both 0.01."""
    log_ratios = torch.tensor([0.5, -2.0, 0.1, 0.3], dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    settings = actor(
        trust_region="second_moment", use_decoupled_loss=False, importance_sampling_level="token", behaviour_clip=False
    )
    offsets = torch.tensor([0, 4])
    result = policy_loss(log_ratios, zeros, zeros, zeros + 1, torch.ones(4), settings, sequence_offsets=offsets)
    assert result.loss.item() == pytest.approx(-(math.exp(-2.0) + math.exp(0.1)) / 4)
    assert result.metrics["clip_fraction"] == 0.5


def test_the_lower_bound_of_the_behaviour_clip_is_off_policy_sequence_masking() -> None:
    """OPSM: A < 0 and mean(b − p) > δ, with δ = −log(1 − eps_clip); a large eps_clip_higher leaves it alone."""
    behaviour = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    proximal = torch.tensor([[-1.1, -1.3], [-1.3, -1.3], [-1.3, -1.3]], dtype=torch.float64)
    advantages, delta = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64), 0.25
    is_kept = [not (a < 0 and gap > delta) for a, gap in zip(advantages, (0.2, 0.3, 0.3), strict=True)]
    settings = actor(
        behaviour_clip=True, eps_clip=1 - math.exp(-delta), eps_clip_higher=1000, behav_imp_weight_mode="disabled"
    )
    policy = proximal.clone().requires_grad_()
    policy_loss(policy, proximal, behaviour, advantages, torch.ones(3, 2), settings).loss.backward()
    assert policy.grad is not None
    assert (policy.grad.abs().sum(1) > 0).tolist() == is_kept == [True, False, True]


def test_dual_clip_bounds_the_loss_of_a_bad_completion() -> None:
    policy, proximal = torch.tensor([[math.log(4.0)]]), torch.zeros(1, 1)
    settings = actor(dual_clip=3.0, behav_imp_weight_mode="disabled")
    result = policy_loss(policy, proximal, proximal, -torch.ones(1, 1), torch.ones(1, 1), settings)
    assert result.loss.item() == pytest.approx(3.0)
    assert result.metrics["dual_clip_fraction"] == 1.0


def test_metrics_report_mask_clip_and_weights() -> None:
    result, _ = packed(actor())
    assert result.metrics["behaviour_mask_fraction"] == pytest.approx(1 / 5)
    assert result.metrics["clip_fraction"] == pytest.approx(2 / 5)
    assert result.metrics["behaviour_weight_max"] == pytest.approx(6.0496474644)
    assert result.metrics["importance_ratio_max"] == pytest.approx(1.1813604129)
    assert (result.num_tokens, result.weight) == (5, 5)


def test_coupled_loss_ignores_the_proximal_policy_and_the_settings_of_its_weight() -> None:
    plain = packed(actor(use_decoupled_loss=False))[0].loss
    with_weights = packed(actor(use_decoupled_loss=False, behav_imp_weight_mode="sequence_mask", behaviour_clip=True))
    assert plain.item() == with_weights[0].loss.item()


# --- an independent reference: one sequence and one token at a time, plain Python floats ---


def reference_second_moment(log_ratios: list[float], advantage: float) -> list[bool]:
    """M2PO's algorithm 1 as in the paper, on one sequence: the largest is removed as long as the mean is too large."""
    kept = [True] * len(log_ratios)
    outward = [t for t, log_ratio in enumerate(log_ratios) if advantage * log_ratio > 0]
    while outward and sum(log_ratios[t] ** 2 for t in outward) / len(outward) > 0.04:
        largest = max(outward, key=lambda t: (log_ratios[t] ** 2, t))
        outward.remove(largest)
        kept[largest] = False
    return kept


def reference_objective(ratios: list[float], advantages: list[float], s: ActorConfig) -> list[float]:
    if s.trust_region == "soft":
        taus = [1.0 if advantage > 0 else 1.05 for advantage in advantages]
        gates = [4 / tau / (1 + math.exp(-tau * (ratio - 1))) for tau, ratio in zip(taus, ratios, strict=True)]
        return [-advantage * gate for advantage, gate in zip(advantages, gates, strict=True)]
    if s.trust_region == "second_moment":
        kept = reference_second_moment([math.log(ratio) for ratio in ratios], advantages[0])
        return [-a * ratio if keep else 0.0 for a, ratio, keep in zip(advantages, ratios, kept, strict=True)]
    lowest, highest = s.clip_range
    losses = []
    for advantage, ratio in zip(advantages, ratios, strict=True):
        loss = max(-advantage * ratio, -advantage * min(max(ratio, lowest), highest))
        losses.append(loss if s.dual_clip is None else min(loss, s.dual_clip * abs(advantage)))
    return losses


def reference_loss(sequences: list[dict[str, list[float]]], s: ActorConfig) -> float:
    lowest, highest = s.clip_range
    sums, means = 0.0, []
    for q in sequences:
        anchor = q["proximal"] if s.use_decoupled_loss else q["behaviour"]
        count = len(q["policy"])
        gaps = [p - b for p, b in zip(anchor, q["behaviour"], strict=True)]
        steps = [t - p for t, p in zip(q["policy"], anchor, strict=True)]
        mean_advantage = sum(q["advantages"]) / count
        drift = math.exp(sum(gaps) / count)
        dropped = s.behaviour_clip and (
            (drift > highest and mean_advantage > 0) or (drift < lowest and mean_advantage < 0)
        )
        total = 0.0
        is_sequence = s.importance_sampling_level == "sequence"
        ratios = [math.exp(sum(steps) / count) if is_sequence else math.exp(step) for step in steps]
        advantages = [mean_advantage if is_sequence else advantage for advantage in q["advantages"]]
        for t, loss in enumerate(reference_objective(ratios, advantages, s)):
            if s.use_decoupled_loss and s.behav_imp_weight_mode != "disabled":
                per_sequence = s.behav_imp_weight_mode.startswith("sequence")
                weight = drift if per_sequence else math.exp(gaps[t])
                if weight > s.behav_imp_weight_cap:
                    weight = s.behav_imp_weight_cap if s.behav_imp_weight_mode.endswith("truncate") else 0.0
                if s.behav_imp_weight_mode == "token_band" and weight < 0.5:
                    weight = 0.0
                loss *= weight
            total += 0.0 if dropped else loss
        sums += total
        means.append(total / count)
    if s.loss_aggregation == "sequence_mean":
        return sum(means) / len(means)
    return sums / sum(len(q["policy"]) for q in sequences)


logprob = st.floats(-4, 0)
variants = st.builds(
    actor,
    importance_sampling_level=st.sampled_from(["sequence", "token"]),
    ratio_gradient=st.sampled_from(["sequence", "token"]),
    use_decoupled_loss=st.booleans(),
    behaviour_clip=st.booleans(),
    behav_imp_weight_mode=st.sampled_from(
        ["token_mask", "token_truncate", "token_band", "sequence_mask", "sequence_truncate", "disabled"]
    ),
    trust_region=st.sampled_from(["clip", "soft", "second_moment"]),
    behav_imp_weight_cap=st.sampled_from([1.0, 2.0, 5.0]),
    loss_aggregation=st.sampled_from(["token_mean", "sequence_mean"]),
    eps_clip=st.sampled_from([0.1, 0.4]),
    eps_clip_higher=st.sampled_from([None, 0.28]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
)


@st.composite
def batches(draw: st.DrawFn) -> list[dict[str, list[float]]]:
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 6))
        columns = {name: [draw(logprob) for _ in range(count)] for name in ("policy", "proximal", "behaviour")}
        sequences.append(columns | {"advantages": [draw(st.floats(-2, 2))] * count})
    return sequences


def as_packed(sequences: list[dict[str, list[float]]], variant: ActorConfig) -> tuple[PolicyLoss, list[Tensor]]:
    columns = {
        name: torch.tensor([x for q in sequences for x in q[name]], dtype=torch.float64) for name in sequences[0]
    }
    policy = columns["policy"].requires_grad_()
    lengths = torch.tensor([0] + [len(q["policy"]) for q in sequences])
    result = policy_loss(
        policy,
        columns["proximal"],
        columns["behaviour"],
        columns["advantages"],
        torch.ones_like(policy),
        variant,
        sequence_offsets=lengths.cumsum(0),
    )
    result.loss.backward()
    assert policy.grad is not None
    return result, list(policy.grad.split(lengths[1:].tolist()))


def as_padded(sequences: list[dict[str, list[float]]], variant: ActorConfig) -> tuple[PolicyLoss, list[Tensor]]:
    """Positions of prompts, of an environment after every second token, and of padding hold NaN, advantages too:
    nothing outside the mask may matter."""
    places = [[1 + i + i // 2 for i in range(len(q["policy"]))] for q in sequences]
    width = max(place[-1] for place in places) + 2
    columns = {name: torch.full((len(sequences), width), math.nan, dtype=torch.float64) for name in sequences[0]}
    mask = torch.zeros(len(sequences), width)
    for row, q in enumerate(sequences):
        mask[row, places[row]] = 1
        for name, values in q.items():
            columns[name][row, places[row]] = torch.tensor(values, dtype=torch.float64)
    policy = columns["policy"].requires_grad_()
    result = policy_loss(policy, columns["proximal"], columns["behaviour"], columns["advantages"], mask, variant)
    result.loss.backward()
    assert policy.grad is not None and not policy.grad[mask == 0].any()
    return result, [policy.grad[row, place] for row, place in enumerate(places)]


@settings(max_examples=200)
@given(batches(), variants)
def test_equals_the_reference_packed_and_padded(sequences: list[dict[str, list[float]]], variant: ActorConfig) -> None:
    flat, flat_gradients = as_packed(sequences, variant)
    square, square_gradients = as_padded(sequences, variant)
    expected = reference_loss(sequences, variant)
    assert flat.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert square.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert square.metrics == pytest.approx(flat.metrics)
    for one, other in zip(flat_gradients, square_gradients, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-9, abs=1e-12)


@settings(max_examples=100)
@given(batches(), variants, st.randoms(use_true_random=False))
def test_permuting_sequences_changes_nothing(sequences, variant, random) -> None:  # type: ignore[no-untyped-def]
    result, gradients = as_packed(sequences, variant)
    order = list(range(len(sequences)))
    random.shuffle(order)
    shuffled, shuffled_gradients = as_packed([sequences[i] for i in order], variant)
    assert shuffled.loss.item() == pytest.approx(result.loss.item(), rel=1e-9, abs=1e-12)
    for place, i in enumerate(order):
        assert shuffled_gradients[place].tolist() == pytest.approx(gradients[i].tolist(), rel=1e-9, abs=1e-12)


@settings(max_examples=100)
@given(batches(), variants)
def test_micro_batches_add_up_by_their_weight(sequences: list[dict[str, list[float]]], variant: ActorConfig) -> None:
    whole, whole_gradients = as_packed(sequences, variant)
    parts = [as_packed([sequence], variant) for sequence in sequences]
    total = sum(part.weight for part, _ in parts)
    assert total == whole.weight
    added = sum(part.loss.item() * part.weight / total for part, _ in parts)
    assert added == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    for (part, (gradient,)), expected in zip(parts, whole_gradients, strict=True):
        assert (gradient * part.weight / total).tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@given(variants)
@settings(max_examples=50)
def test_on_policy_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(variant: ActorConfig) -> None:
    logprobs = torch.tensor([-0.5, -1.0, -0.2, -2.0], dtype=torch.float64)
    advantages = torch.tensor([1.5, 1.5, -0.5, -0.5], dtype=torch.float64)
    result = policy_loss(
        logprobs, logprobs, logprobs, advantages, torch.ones(4), variant, sequence_offsets=torch.tensor([0, 2, 4])
    )
    assert result.metrics["importance_ratio_mean"] == 1.0
    if variant.trust_region == "soft":  # f(1) = 2/τ; its slope is what is 1
        advantages = advantages * torch.tensor([2.0, 2.0, 2 / 1.05, 2 / 1.05], dtype=torch.float64)
    assert result.loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-12)


@given(variants)
@settings(max_examples=50)
def test_an_all_masked_batch_gives_zero_and_a_zero_gradient(variant: ActorConfig) -> None:
    policy = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    other = torch.full((2, 3), math.nan, dtype=torch.float64)
    result = policy_loss(policy, other, other, other, torch.zeros(2, 3), variant)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert policy.grad is not None and policy.grad.abs().sum().item() == 0.0
    assert all(value == 0.0 for value in result.metrics.values())


def test_one_advantage_per_sequence_is_spread_over_its_tokens() -> None:
    values = torch.tensor(POLICY, dtype=torch.float64)
    other = torch.tensor(PROXIMAL, dtype=torch.float64)
    per_sequence = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = policy_loss(
        values,
        other,
        torch.tensor(BEHAVIOUR, dtype=torch.float64),
        per_sequence,
        torch.ones(5),
        actor(),
        sequence_offsets=OFFSETS,
    )
    assert result.loss.item() == pytest.approx(-0.2133632542, abs=1e-9)


def test_contradicting_shapes_are_refused() -> None:
    flat, square = torch.zeros(5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"do not tile"):
        policy_loss(flat, flat, flat, flat, flat, actor(), sequence_offsets=torch.tensor([0, 3, 4]))
    with pytest.raises(ValueError, match=r"expected \(B, T\)"):
        policy_loss(flat, flat, flat, flat, flat, actor())
    with pytest.raises(ValueError, match="loss_mask"):
        policy_loss(square, square, square, square, torch.zeros(2, 4), actor())
    with pytest.raises(ValueError, match="5 log-probabilities for 6"):
        policy_loss(square, flat, square, square, square, actor())


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_estimators(estimator, expected: float) -> None:  # type: ignore[no-untyped-def]
    assert reference_kl(torch.tensor(-1.0), torch.tensor(-1.5), estimator).item() == pytest.approx(expected)
    assert reference_kl(torch.tensor(0.0), torch.tensor(-50.0), "k1").item() == 10.0
