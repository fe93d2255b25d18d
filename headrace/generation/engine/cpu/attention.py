"""Attention for SGLang on a CPU, computed for many sequences of a batch at once; SGLang loops over them in Python.

The results are equal up to rounding, and most of a decode step's time is saved. Sequences are padded to the longest one
and the padding is masked. A decode step groups sequences of similar length, so that a few long ones do not make all of
them long. Installed by SGLang's plugin hooks. Cases that these functions do not cover (encoders, sliding windows, very
long prefills) go to the original. Imported in SGLang's processes only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
MAX_SCORES = 1 << 26
"""Maximum number of attention scores of a padded prefill; longer prefills go to the original."""
MIN_LENGTH_SHARE = 0.6
"""A sequence shorter than this share of its group's longest one starts a new group if that saves more than
`MIN_SAVED_TOKENS` of padding."""
MIN_SAVED_TOKENS = 600
"""Tokens of padding that cost about as much as the small operations of one more group."""


def decode(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """One new token for each of B sequences: `query` and `output` are `(B, heads, dim)`."""
    if encoder_lens is not None or options.get("sliding_window_size") is not None:
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **options
        )
    for part in _length_buckets(seq_lens):
        slots, inside = _slots(req_to_token, req_pool_indices[part], seq_lens[part])
        # No variable holds the tensors: each part must reuse the freed memory of the last one, or the kernel maps new
        # pages each time.
        output[part] = _attend(
            query[part, None], _gather(k_cache, slots), _gather(v_cache, slots), inside[:, None, :], options
        )[:, 0]
    return output


def extend(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_prefix_lens: Tensor,
    extend_seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A prefill: `query` and `output` are `(N, heads, dim)`, the new tokens of B sequences, concatenated."""
    longest = int(extend_seq_lens.max())
    num_scores = len(seq_lens) * longest * int(seq_lens.max()) * query.shape[1]
    is_plain = options.get("causal") and encoder_lens is None and options.get("sliding_window_size") is None
    if not is_plain or num_scores > MAX_SCORES:
        lengths = (seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens)
        return original(backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, *lengths, **options)
    row = torch.arange(len(seq_lens)).repeat_interleave(extend_seq_lens)
    place = torch.arange(len(query)) - (extend_seq_lens.cumsum(0) - extend_seq_lens)[row]
    padded = query.new_zeros(len(seq_lens), longest, *query.shape[1:])
    padded[row, place] = query
    slots, inside = _slots(req_to_token, req_pool_indices, seq_lens)
    last_seen = extend_prefix_lens[:, None] + torch.arange(longest)
    visible = inside[:, None, :] & (torch.arange(slots.shape[1]) <= last_seen[:, :, None])
    output.copy_(_attend(padded, _gather(k_cache, slots), _gather(v_cache, slots), visible, options)[row, place])
    return output


def _length_buckets(seq_lens: Tensor) -> Iterator[Tensor]:
    """Yields the indices of sequences of similar length, the longest first."""
    order = seq_lens.argsort(descending=True)
    lengths, first = seq_lens[order].tolist(), 0
    for index, length in enumerate(lengths):
        saved = (lengths[first] - length) * (len(lengths) - index)
        if length < MIN_LENGTH_SHARE * lengths[first] and saved > MIN_SAVED_TOKENS:
            yield order[first:index]
            first = index
    yield order[first:]


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """`cache[slots]` of shape `(B, longest, kv_heads, dim)`, gathered by whole rows."""
    return cache.flatten(1).index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[1:])


def _slots(req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """The cache slots of each sequence, `(B, longest)`, and a mask of those that are its own. The padding repeats the
    first slot, so that only written memory is read."""
    places = torch.arange(int(seq_lens.max()))
    inside = places < seq_lens[:, None]
    return torch.where(
        inside, req_to_token[req_pool_indices, : len(places)], req_to_token[req_pool_indices, :1]
    ), inside


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of `query` `(B, Q, heads, dim)` to `key` and `value` `(B, K, kv_heads, dim)`, masked by `visible`
    `(B, Q, K)`.

    Heads that share a key are treated as further queries of the sequence, so that keys are not repeated for them.
    """
    sharing = query.shape[2] // key.shape[2]
    rows = query.unflatten(2, (key.shape[2], sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    attended = scaled_dot_product_attention(
        rows,
        key.to(query.dtype).transpose(1, 2),
        value.to(query.dtype).transpose(1, 2),
        attn_mask=visible.repeat(1, sharing, 1)[:, None],
        scale=options.get("scaling"),
    )
    result: Tensor = attended.unflatten(2, (sharing, query.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return result


HOOKS = {f"{BACKEND}._run_sdpa_forward_decode": decode, f"{BACKEND}._run_sdpa_forward_extend": extend}
