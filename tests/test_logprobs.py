"""Chunked log-probabilities against torch's own, values and gradients."""

import pytest
import torch

from services.learner.logprobs import token_logprobs


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_equals_log_softmax_with_gradients(chunk_tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    temperature = torch.tensor([1.0, 0.7, 1.0, 1.3, 0.7, 1.0, 2.0], dtype=torch.float64)
    upstream = torch.randn(7, dtype=torch.float64)

    plain = torch.log_softmax(hidden @ weight.T / temperature[:, None], dim=1)[torch.arange(7), targets]
    expected = torch.autograd.grad(plain @ upstream, (hidden, weight))
    ours = token_logprobs(hidden, weight, targets, temperature, chunk_tokens)
    gradients = torch.autograd.grad(ours @ upstream, (hidden, weight))

    assert torch.allclose(ours, plain, atol=1e-12)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, reference, atol=1e-12)


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    plain = torch.Tensor.logsumexp

    def counting(logits: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(len(logits))
        return plain(logits, dim)

    monkeypatch.setattr(torch.Tensor, "logsumexp", counting)
    token_logprobs(torch.randn(10, 4), torch.randn(6, 4), torch.zeros(10, dtype=torch.long), torch.ones(10), 4)
    assert rows == [4, 4, 2]


def test_no_tokens() -> None:
    empty = token_logprobs(torch.zeros(0, 4), torch.zeros(6, 4), torch.zeros(0, dtype=torch.long), torch.ones(0), 4)
    assert empty.shape == (0,)
