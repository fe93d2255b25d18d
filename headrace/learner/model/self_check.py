"""What a model can be computed by, found out by computing: with its prompts shared, or each sequence by itself.

A few tokens, when the model is loaded. Hidden states must be those of each sequence alone, and must not depend on
another completion's tokens, which the gradient says exactly: it is zero. Logits must be the head's weight times the
last hidden states, and nothing else, for that is all that log-probabilities are computed from.
"""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace.learner.model.shared_prefix import Layout, hidden_states, places, use_shared_prompts

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Relative. bfloat16 alone makes about 0.01, and more where it makes a router choose another expert."""
SHARED_TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.03}
"""Or `TIMES_NOISE` of what it is with a sequence a row, if that is more: attention may have parts that ours has not."""
TIMES_NOISE = 3
LAYOUT = Layout([5, 3], [[3, 4], [2]])
FIRST = slice(5, 8)
"""The tokens of the first prompt's first completion."""
OTHERS = [*range(8, 12), 15, 16]
"""Of its second completion, and of the other prompt's."""
PADDING_OF_LAST_ROW = slice(5, None)
_log = logging.getLogger(__name__)


class Wrong(Exception):
    """This way to compute a model; the text says why."""


def shares_prompts(model: PreTrainedModel, name: str) -> bool:
    """Whether `model` can share a prompt among completions; then it has our attention for it. Raises `ValueError` if
    not even sequences side by side, padded on the right, are computed as each alone."""
    tokens = torch.arange(LAYOUT.num_tokens, device=model.device) * 7 % model.config.get_text_config().vocab_size
    _check_logits(model, name, tokens)
    with torch.no_grad():
        expected = torch.cat([_alone(model, tokens[[*range(5), *range(8, 12)]])[5:], _alone(model, tokens[12:])[3:]])
    try:
        noise = _distance(model, tokens, expected, TOLERANCE[model.dtype], is_shared=False)
    except Wrong as wrong:
        raise ValueError(f"model {name!r} cannot be trained: {wrong}; expected a causal language model") from wrong
    own_attention = model.config._attn_implementation
    try:
        tolerance = max(SHARED_TOLERANCE[model.dtype], TIMES_NOISE * noise)
        _distance(model, tokens, expected, tolerance, is_shared=True)
    except Wrong as wrong:
        model.set_attn_implementation(own_attention)
        _log.warning(
            "model %s computes a prompt once for each completion, not once for all: with it shared, %s, since layers "
            "look at other tokens by other ways than transformers' attention interface, or do more in it",
            name,
            wrong,
        )
        return False
    return True


def _alone(model: PreTrainedModel, row: Tensor) -> Tensor:
    hidden: Tensor = model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0]
    return hidden.float()


def _distance(model: PreTrainedModel, tokens: Tensor, expected: Tensor, tolerance: float, *, is_shared: bool) -> float:
    """Of the hidden states that `model` computes this way. Raises `Wrong`."""
    embedded: list[Tensor] = []

    def embed(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    embedding = model.get_input_embeddings().register_forward_hook(embed)
    try:
        if is_shared:
            use_shared_prompts(model)
        found = hidden_states(model, tokens[None], places(LAYOUT, model.device), is_shared=is_shared)[OTHERS].float()
        (gradient,) = torch.autograd.grad(found.square().sum(), embedded)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise Wrong(f"it fails ({str(error).splitlines()[0]})") from error
    finally:
        embedding.remove()
    distance = float((found.detach() - expected).norm() / expected.norm())
    if not distance <= tolerance:
        raise Wrong(f"hidden states are off by {distance:.2g}")
    unseen = [gradient[0, FIRST]] if is_shared else [gradient[0], gradient[-1, PADDING_OF_LAST_ROW]]
    if any(bool(part.any()) for part in unseen):
        raise Wrong("a completion depends on another or on padding")
    return distance


@torch.no_grad()
def _check_logits(model: PreTrainedModel, name: str, tokens: Tensor) -> None:
    row = tokens[None, :8]
    head = model.get_output_embeddings()
    if head is None or not hasattr(model.get_decoder()(input_ids=row, use_cache=False), "last_hidden_state"):
        raise ValueError(f"model {name!r} cannot be trained: expected a decoder and a head that transformers tells")
    expected: Tensor = model(input_ids=row, use_cache=False).logits[0].float()
    found = _alone(model, row[0]) @ head.weight.float().T
    distance = ((found - expected).norm() / expected.norm()).item()
    if not distance <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"model {name!r} cannot be trained: its logits are off by {distance:.2g} from the head's weight times the "
            "last hidden states; expected a head without bias, scale and cap"
        )
