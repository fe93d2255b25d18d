"""Chunked log-probabilities and entropies against torch's own in float64, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.learner.model import logprobs
from headrace.learner.model.logprobs import score_tokens

TEMPERATURE = torch.tensor([1.0, 0.7, 1.0, 1.3, 0.7, 1.0, 2.0], dtype=torch.float64)


def made(num_tokens: int, width: int, vocabulary: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states, head, targets, and the gradients of the log-probabilities."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    targets, upstream = torch.randint(0, vocabulary, (num_tokens,)), torch.randn(num_tokens, dtype=torch.float64)
    return hidden, weight, targets, upstream


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Log-probabilities, entropies and gradients of the same bits in float64."""
    hidden, weight = (one.detach().double().requires_grad_() for one in (hidden, weight))
    every = torch.log_softmax(hidden @ weight.T / temperature[:, None].double(), dim=1)
    plain = every[torch.arange(len(targets)), targets]
    return plain, -(every.exp() * every).sum(1), torch.autograd.grad(plain @ upstream, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_equals_log_softmax_with_gradients(chunk_tokens: int) -> None:
    hidden, weight, targets, upstream = made(7, 5, 11, torch.float64)
    plain, entropy, expected = exact(hidden, weight, targets, upstream, TEMPERATURE)
    ours = score_tokens(hidden, weight, targets, TEMPERATURE, chunk_tokens)
    gradients = torch.autograd.grad(ours.logprobs @ upstream, (hidden, weight))
    torch.testing.assert_close(ours.logprobs, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.entropy, entropy, atol=1e-12, rtol=0)
    assert ours.logprobs.requires_grad and not ours.entropy.requires_grad
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-12, rtol=0)


def test_entropies_of_known_distributions() -> None:
    """Uniform over four of eight tokens, and almost certain."""
    logits = torch.tensor([[0.0] * 4 + [-1e4] * 4, [50.0] + [0.0] * 7])
    scored = score_tokens(logits, torch.eye(8), torch.tensor([1, 0]), torch.ones(2), 2)
    assert scored.entropy.tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0.0], abs=1e-6)
    assert scored.logprobs.tolist() == pytest.approx([-torch.tensor(4.0).log().item(), 0.0], abs=1e-6)


def test_a_bfloat16_models_logits_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of about ±30, where bfloat16 has steps of 0.125: values are as exact as float32, gradients as their
    dtype."""
    monkeypatch.setattr(logprobs, "VOCABULARY_BLOCK", 100)
    hidden, weight, targets, upstream = made(64, 48, 317, torch.bfloat16, scale=1.5)
    temperature = torch.full((64,), 0.8)
    plain, entropy, expected = exact(hidden, weight, targets, upstream, temperature)
    ours = score_tokens(hidden, weight, targets, temperature, 9)
    assert ours.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.logprobs.double(), plain, atol=3e-5, rtol=0)
    torch.testing.assert_close(ours.entropy.double(), entropy, atol=3e-5, rtol=0)
    rounded = torch.log_softmax((hidden @ weight.T).float() / 0.8, 1)[torch.arange(64), targets]
    assert (rounded - plain).abs().max() > 0.03, "what a bfloat16 product would have lost"
    gradients = torch.autograd.grad(ours.logprobs @ upstream.float(), (hidden, weight))
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.linalg.vector_norm(gradient.double() - reference) < 3e-3 * torch.linalg.vector_norm(reference)


class Recording(TorchDispatchMode):
    """Records the matrix products, and the largest tensor with the given number of columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns, self.most_rows, self.products = columns, 0, list[tuple[str, torch.dtype]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == self.columns:
                self.most_rows = max(self.most_rows, one.shape[0])
        if "mm" in func.__name__:
            self.products.append((func.__name__, result.dtype))
        return result


def test_logits_of_the_whole_batch_never_exist() -> None:
    hidden, weight, targets, upstream = made(10, 4, 6, torch.float32)
    with Recording(columns=6) as recording:
        (score_tokens(hidden, weight, targets, torch.ones(10), 4).logprobs @ upstream.float()).backward()
    assert recording.most_rows == 4


def test_on_cuda_a_bfloat16_product_returns_float32() -> None:
    """Shapes and dtypes of the products with torch's fake CUDA tensors; nothing is computed."""
    with FakeTensorMode(), Recording(columns=96) as recording:
        hidden, weight = (torch.empty(rows, 32, dtype=torch.bfloat16, device="cuda") for rows in (20, 96))
        logits = logprobs._logits(hidden, weight, torch.empty(20, device="cuda"))
        grad_weight = torch.empty(96, 32, device="cuda")
        grad_hidden = logprobs._add_gradients(logits, hidden, weight, grad_weight)
    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (20, 96), "cuda")
    assert (grad_hidden.dtype, grad_hidden.shape) == (torch.bfloat16, (20, 32))
    assert recording.products == [("mm.dtype", torch.float32)] * 2 + [("mm.default", torch.bfloat16)]
