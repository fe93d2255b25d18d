"""A group's prompt computed once for all its completions: the layout of a packed row, and the attention over it.

The row is groups one after another, each its prompt and then its completions, without padding: `prompt, c, c, …,
prompt, c, …`. Everything but attention works token by token and needs only the positions. Attention alone lays each
completion out behind its prompt, in rows padded on the right; there a prompt's queries are computed once for each
completion, and one result is kept. Values and gradients are those of the unshared computation. `Layout` is of a
micro-batch, `Places` the same as index tensors on a device, made once for all layers.

A model whose layers look at other tokens by other ways than transformers' attention interface (a recurrent state, a
convolution) shares no prompt: all of it computes those padded rows, a sequence each, and what they share of a prompt is
taken from one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "headrace_shared_prompts"
PADDING = -1


@dataclass(frozen=True)
class Layout:
    """G groups with R completions of T tokens in all; a prompt has at least one token and one completion."""

    prompt_lengths: Sequence[int]
    completion_lengths: Sequence[Sequence[int]]
    """Of each group."""

    @property
    def num_tokens(self) -> int:
        return sum(self.prompt_lengths) + sum(map(sum, self.completion_lengths))

    @cached_property
    def spans(self) -> list[tuple[range, range]]:
        """Of each completion: where its prompt and where itself stand in `(T,)`."""
        found, place = [], 0
        for prompt, lengths in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            ends = list(accumulate(lengths, initial=place + prompt))
            for start, length in zip(ends, lengths, strict=False):
                found.append((range(place, place + prompt), range(start, start + length)))
            place = ends[-1]
        return found

    @cached_property
    def indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`positions`, `rows` and `back` of `Places`, int64: for every pass over the micro-batch."""
        width = max(len(prompt) + len(completion) for prompt, completion in self.spans)
        rows = np.full((len(self.spans), width), PADDING)
        positions, back = np.empty(self.num_tokens, np.int64), np.empty(self.num_tokens, np.int64)
        for row, (prompt, completion) in reversed(list(enumerate(self.spans))):
            tokens = np.r_[prompt.start : prompt.stop, completion.start : completion.stop]
            rows[row, : len(tokens)] = tokens
            positions[tokens] = np.arange(len(tokens))
            back[tokens] = row * width + np.arange(len(tokens))
        is_padding = rows == PADDING
        rows[is_padding] = np.arange(is_padding.sum()) % self.num_tokens
        return positions[None], rows, back


@dataclass(frozen=True)
class Places:
    """Index tensors of a `Layout`."""

    positions: Tensor
    """`(1, T)`: each token's place in its own sequence."""
    rows: Tensor
    """`(R, W)`: the tokens of each prompt with one completion, padded with other tokens, which none of them sees: with
    each about as often, since the backward pass adds up what stands for the same token one after another on CUDA."""
    back: Tensor
    """`(T,)`: where each token stands in `rows`, flattened; of a prompt's, in its first completion's row."""


def places(layout: Layout, device: torch.device) -> Places:
    return Places(*(torch.from_numpy(array).to(device, non_blocking=True) for array in layout.indices))


def use_shared_prompts(model: PreTrainedModel) -> None:
    """Gives `model` our attention in the place of its own."""
    model.set_attn_implementation(ATTENTION)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, places: Places, *, is_shared: bool) -> Tensor:
    """`(T, H)` of the tokens `(1, T)`; `is_shared`: `model` has our attention in the place of its own."""
    decoder = model.get_decoder()
    if is_shared:
        found = decoder(input_ids=input_ids, position_ids=places.positions, use_cache=False, places=places)
        hidden: Tensor = found.last_hidden_state[0]
        return hidden
    rows: Tensor = decoder(input_ids=input_ids[0][places.rows], use_cache=False).last_hidden_state
    return rows.flatten(0, 1)[places.back]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    places: Places,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: `query` `(1, heads, T, D)`, `key` and `value` with as many heads or a divisor of them;
    returns `(1, T, heads, D)`."""
    repeats = query.shape[1] // key.shape[1]
    parts = (query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0))
    queries, keys, values = (part[:, places.rows].transpose(0, 1) for part in parts)
    mask = None if sliding_window is None else _within(sliding_window, places.rows)
    found = scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=scaling)
    return found.transpose(1, 2).flatten(0, 1)[places.back][None], None


def _within(window: int, rows: Tensor) -> Tensor:
    """`(W, W)`: true where a token sees another."""
    place = torch.arange(rows.shape[1], device=rows.device)
    ahead = place[:, None] - place
    return (ahead >= 0) & (ahead < window)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
