"""Checks on a few tokens, when a model is loaded, that it can be trained, and whether its prompts can be shared.

The hidden states must be those of each sequence alone. They must not depend on another completion's tokens: their
gradient with respect to these must be exactly zero. The logits must be the head's weight times the last hidden states,
because log-probabilities are computed that way.
"""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace.learner.model.shared_prefix import Layout, hidden_states, layout_tensors, use_shared_prompts

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Maximum relative error. bfloat16 alone causes about 0.01, and more if it makes a router choose another expert."""
SHARED_TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.03}
"""The same with shared prompts, or `NOISE_FACTOR` times the error with one sequence per row if that is larger: the
model's attention may do more than ours."""
NOISE_FACTOR = 3
LAYOUT = Layout([5, 3], [[3, 4], [2]])
FIRST = slice(5, 8)
"""Positions of the first prompt's first completion."""
OTHERS = [*range(8, 12), 15, 16]
"""Positions of its second completion and of the other prompt's completion."""
PADDING_OF_LAST_ROW = slice(5, None)
_log = logging.getLogger(__name__)


class _CheckFailed(Exception):
    """The model cannot be computed this way; the text says why."""


def can_share_prompts(model: PreTrainedModel, name: str) -> bool:
    """Whether `model` can share a prompt among completions; if so, its attention is replaced by ours. Raises
    `ValueError` if even a batch of sequences padded on the right gives other results than each sequence alone."""
    tokens = torch.arange(LAYOUT.num_tokens, device=model.device) * 7 % model.config.get_text_config().vocab_size
    _check_logits(model, name, tokens)
    with torch.no_grad():
        expected = torch.cat(
            [_unpadded(model, tokens[[*range(5), *range(8, 12)]])[5:], _unpadded(model, tokens[12:])[3:]]
        )
    try:
        noise = _relative_error(model, tokens, expected, TOLERANCE[model.dtype], is_shared=False)
    except _CheckFailed as wrong:
        raise ValueError(f"model {name!r} cannot be trained: {wrong}; expected a causal language model") from wrong
    own_attention = model.config._attn_implementation
    try:
        tolerance = max(SHARED_TOLERANCE[model.dtype], NOISE_FACTOR * noise)
        _relative_error(model, tokens, expected, tolerance, is_shared=True)
    except _CheckFailed as wrong:
        model.set_attn_implementation(own_attention)
        _log.warning(
            "model %s computes a prompt once for each completion, not once for all: with the prompt shared, %s. Some "
            "layers use other tokens in other ways than by transformers' attention interface, or do more in it",
            name,
            wrong,
        )
        return False
    return True


def _unpadded(model: PreTrainedModel, row: Tensor) -> Tensor:
    """The last hidden states `(T, H)` of a single sequence `(T,)`, in float32."""
    hidden: Tensor = model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0]
    return hidden.float()


def _relative_error(
    model: PreTrainedModel, tokens: Tensor, expected: Tensor, tolerance: float, *, is_shared: bool
) -> float:
    """The relative error of the hidden states that `model` computes this way. Raises `_CheckFailed`."""
    embedded: list[Tensor] = []

    def embed(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    embedding = model.get_input_embeddings().register_forward_hook(embed)
    try:
        if is_shared:
            use_shared_prompts(model)
        layout = layout_tensors(LAYOUT, model.device)
        found = hidden_states(model, tokens[None], layout, is_shared=is_shared)[OTHERS].float()
        (gradient,) = torch.autograd.grad(found.square().sum(), embedded)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _CheckFailed(f"it fails ({str(error).splitlines()[0]})") from error
    finally:
        embedding.remove()
    deviation = float((found.detach() - expected).norm() / expected.norm())
    if not deviation <= tolerance:
        raise _CheckFailed(f"hidden states are off by {deviation:.2g}")
    unseen = [gradient[0, FIRST]] if is_shared else [gradient[0], gradient[-1, PADDING_OF_LAST_ROW]]
    if any(bool(part.any()) for part in unseen):
        raise _CheckFailed("a completion depends on another or on padding")
    return deviation


@torch.no_grad()
def _check_logits(model: PreTrainedModel, name: str, tokens: Tensor) -> None:
    row = tokens[None, :8]
    head = model.get_output_embeddings()
    if head is None or not hasattr(model.get_decoder()(input_ids=row, use_cache=False), "last_hidden_state"):
        raise ValueError(f"model {name!r} cannot be trained: expected a decoder and a head that transformers exposes")
    expected: Tensor = model(input_ids=row, use_cache=False).logits[0].float()
    found = _unpadded(model, row[0]) @ head.weight.float().T
    deviation = ((found - expected).norm() / expected.norm()).item()
    if not deviation <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"model {name!r} cannot be trained: its logits are off by {deviation:.2g} from the head's weight times the "
            "last hidden states; expected a head without bias, scale and cap"
        )
