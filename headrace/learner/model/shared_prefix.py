"""Shared prompts: the layout of a packed row, and attention that computes a group's prompt once for all completions.

The row contains the groups one after another, each with its prompt and then its completions, without padding: `prompt,
c, c, …, prompt, c, …`. Everything but attention works token by token and needs only the positions. Attention copies
each completion behind its prompt, into rows padded on the right; there a prompt's queries are computed once for each
completion, and one result is kept. Values and gradients are those of the unshared computation. `Layout` describes a
micro-batch; `LayoutTensors` are its index tensors on a device, made once for all layers.

A model whose layers use other tokens in other ways than by transformers' attention interface (a recurrent state, a
convolution) cannot share prompts. Then the whole model computes the padded rows, one sequence each, and a prompt's
hidden states are taken from one of its rows.
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
    """For each group, the lengths of its completions."""

    @property
    def num_tokens(self) -> int:
        return sum(self.prompt_lengths) + sum(map(sum, self.completion_lengths))

    @cached_property
    def spans(self) -> list[tuple[range, range]]:
        """For each completion, the positions of its prompt and of itself in the row."""
        found, offset = [], 0
        for prompt, lengths in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            ends = list(accumulate(lengths, initial=offset + prompt))
            for start, length in zip(ends, lengths, strict=False):
                found.append((range(offset, offset + prompt), range(start, start + length)))
            offset = ends[-1]
        return found

    @cached_property
    def indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`positions`, `rows` and `back` of `LayoutTensors`, int64; cached, for all passes over the micro-batch."""
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
class LayoutTensors:
    """Index tensors of a `Layout`."""

    positions: Tensor
    """`(1, T)`: each token's position in its own sequence."""
    rows: Tensor
    """`(R, W)`: for each completion, the indices of its prompt's and its own tokens. The padding consists of other
    tokens, which no token attends to; each occurs about equally often, because on CUDA the backward pass adds the
    gradients of repeated indices one after another."""
    back: Tensor
    """`(T,)`: each token's index in the flattened `rows`; a prompt's tokens are in its first completion's row."""


def layout_tensors(layout: Layout, device: torch.device) -> LayoutTensors:
    return LayoutTensors(*(torch.from_numpy(array).to(device, non_blocking=True) for array in layout.indices))


def use_shared_prompts(model: PreTrainedModel) -> None:
    """Replaces `model`'s attention by ours."""
    model.set_attn_implementation(ATTENTION)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, layout: LayoutTensors, *, is_shared: bool) -> Tensor:
    """The last hidden states `(T, H)` of the tokens `(1, T)`; `is_shared`: `use_shared_prompts(model)` was called."""
    decoder = model.get_decoder()
    if is_shared:
        found = decoder(input_ids=input_ids, position_ids=layout.positions, use_cache=False, layout=layout)
        hidden: Tensor = found.last_hidden_state[0]
        return hidden
    rows: Tensor = decoder(input_ids=input_ids[0][layout.rows], use_cache=False).last_hidden_state
    return rows.flatten(0, 1)[layout.back]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: LayoutTensors,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: `query` `(1, heads, T, D)`, `key` and `value` with as many heads or a divisor of them;
    returns `(1, T, heads, D)`."""
    repeats = query.shape[1] // key.shape[1]
    parts = (query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0))
    queries, keys, values = (part[:, layout.rows].transpose(0, 1) for part in parts)
    mask = None if sliding_window is None else _within(sliding_window, layout.rows)
    found = scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=scaling)
    return found.transpose(1, 2).flatten(0, 1)[layout.back][None], None


def _within(window: int, rows: Tensor) -> Tensor:
    """`(W, W)`: true where a token attends to another."""
    place = torch.arange(rows.shape[1], device=rows.device)
    ahead = place[:, None] - place
    return (ahead >= 0) & (ahead < window)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
