"""Sampling with one random number per sequence has the same distribution as SGLang's."""

from typing import Any

import torch

from headrace.generation.engine.cpu.sampling import sample
from tests.generation.test_cpu_attention import refuse


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Three different rows; a chi-squared of 63 degrees of freedom exceeds 120 once in 100,000 times."""
    torch.manual_seed(0)
    num_draws, probs = 20_000, torch.randn(3, 64).mul(2).softmax(-1)
    drawn = sample(refuse, probs.repeat_interleave(num_draws, 0))
    assert drawn.dtype == torch.int32
    for row, tokens in zip(probs.double(), drawn.view(3, num_draws), strict=True):
        counts, expected = torch.bincount(tokens, minlength=64), row * num_draws
        assert float(((counts - expected) ** 2 / expected).sum()) < 120


def test_tokens_of_probability_0_are_never_drawn() -> None:
    probs = torch.zeros(5000, 8)
    probs[:, [2, 5]] = torch.tensor([1e-6, 1.0])
    assert set(sample(refuse, probs).tolist()) <= {2, 5}
    assert sample(refuse, torch.eye(8)).tolist() == list(range(8))


def test_the_last_token_is_drawn_at_the_end_of_the_distribution(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: torch.ones(*shape, dtype=dtype))
    assert sample(refuse, torch.full((1, 4), 0.25)).tolist() == [3]


def test_a_seed_goes_to_the_original() -> None:
    sentinel = torch.zeros(0)
    assert sample(lambda *_: sentinel, torch.ones(1, 2), torch.tensor([1]), torch.tensor([0])) is sentinel
