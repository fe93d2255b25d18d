"""Prefills of SGLang on a CPU that compute what completions have in common once: a group's prompt, a chat template.

What a token becomes depends on it and on what stands before it alone. So of the tokens of a batch that are the same
after the same ones, one goes through embeddings, projections and MLPs; attention runs on all of them, so that every
sequence has keys and values of its own, and nothing of SGLang's memory is shared. A prefix cache would hardly find
these: completions of a group arrive together, and every version of the weights empties it.

Installed by SGLang's plugin hooks; what is more than a plain prefill of text (LoRA, images, states beside keys and
values, …) is computed as SGLang does. Imported in SGLang's processes only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

RUNNER = "sglang.srt.model_executor.runner.eager_runner.EagerRunner"
BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor"
MAX_SHARE = 0.9
"""Of the tokens that are computed: above it, too little is saved."""
NOT_PLAIN = (
    *("input_embeds", "replace_embeds", "token_type_ids", "mrope_positions", "encoder_lens", "spec_info"),
    *("mamba_track_indices", "ngram_embedding_info", "engram_history", "global_num_tokens_cpu"),
)
"""Fields of a batch that say nothing in a plain prefill of text."""


class Shared(NamedTuple):
    """Which of the N tokens of a flattened batch are computed, U of them; M are of sequences with any of these."""

    computed: Tensor
    """`(U,)` int64: their places in the batch."""
    source: Tensor
    """`(N,)` int64: for each token of the batch, which of the computed ones it equals."""
    rows: Tensor
    """int64: the sequences with computed tokens."""
    asked: Tensor
    """`(M,)` int64: for each token of `rows`, which of the computed ones it equals."""
    answers: Tensor
    """`(U,)` int64: where each computed token stands among those of `rows`."""


class Rows(NamedTuple):
    """All that attention reads of a batch."""

    out_cache_loc: Tensor
    """`(N,)`: where keys and values of all tokens go."""
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_prefix_lens: Tensor
    extend_seq_lens: Tensor
    encoder_lens: None = None


_current: tuple[Shared, Rows] | None = None
"""Of the prefill that goes on: a scheduler computes one at a time."""


def install() -> None:
    """Registers the hooks; SGLang applies them when its process loads plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{RUNNER}._execute_extend", prefill, HookType.AROUND)
    HookRegistry.register(f"{BACKEND}.forward_extend", attention, HookType.AROUND)
    HookRegistry.register(f"{LOGITS}.forward", before_logits, HookType.BEFORE)


def prefill(original: Callable[..., Any], runner: Any, batch: Any, *arguments: Any) -> Any:
    """SGLang's runner of a prefill, given the tokens that are computed."""
    global _current
    shared = _shared(runner, batch)
    if shared is None:
        return original(runner, batch, *arguments)
    narrowed = {name: getattr(batch, name)[shared.computed] for name in ("input_ids", "positions", "out_cache_loc")}
    _current = shared, Rows(batch.out_cache_loc, *(getattr(batch, name)[shared.rows] for name in Rows._fields[1:5]))
    try:
        return original(runner, dataclasses.replace(batch, **narrowed), *arguments)
    finally:
        _current = None


def attention(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Any,
    batch: Any,
    *arguments: Any,
    **options: Any,
) -> Tensor:
    """A layer's attention of a prefill: `query`, `key`, `value` and the answer are `(U, …)`. All tokens get keys and
    values, what has a computed token asks."""
    if _current is None:
        return original(backend, query, key, value, layer, batch, *arguments, **options)
    shared, rows = _current
    whole = key[shared.source], value[shared.source]
    return original(backend, query[shared.asked], *whole, layer, rows, *arguments, **options)[shared.answers]


def before_logits(processor: Any, tokens: Any, states: Tensor, *others: Any, **named: Any) -> Any:
    """Hands SGLang `states` `(U, hidden)` as of the whole batch, where it looks for the last of each sequence."""
    if _current is None:
        return None
    return (processor, tokens, states[_current[0].source], *others), named


def share(tokens: np.ndarray, lengths: np.ndarray, prefixes: np.ndarray) -> Shared:
    """`tokens` `(N,)` of B sequences one after another, `lengths` `(B,)` of each; what stands before those whose
    `prefixes` `(B,)` are not 0 is not known here, so that they share nothing."""
    starts, source = lengths.cumsum() - lengths, np.full(len(tokens), -1)
    before = np.where(prefixes == 0, 0, -1 - np.arange(len(lengths)))  # by a number, so that equals are the same
    rows, computed, num_computed = np.arange(len(lengths)), [], 0
    for depth in range(int(lengths.max())):
        rows = rows[lengths[rows] > depth]
        places = starts[rows] + depth
        _, first, which = np.unique((before[rows] << 32) + tokens[places], return_index=True, return_inverse=True)
        if len(first) == len(rows):  # from here on all are different
            break
        computed.append(places[first])
        source[places] = num_computed + which
        num_computed += len(first)
        before[rows] = source[places] + 1
    rest = np.flatnonzero(source < 0)
    source[rest] = num_computed + np.arange(len(rest))
    return _with_rows(np.concatenate([*computed, rest]), source, starts)


def _with_rows(computed: np.ndarray, source: np.ndarray, starts: np.ndarray) -> Shared:
    row_of = np.searchsorted(starts, np.arange(len(source)), "right") - 1
    rows = np.unique(row_of[computed])
    asked = np.flatnonzero(np.isin(row_of, rows))
    parts = (computed, source, rows, source[asked], np.searchsorted(asked, computed))
    return Shared(*(torch.from_numpy(part) for part in parts))


def _shared(runner: Any, batch: Any) -> Shared | None:
    """None where nothing may be shared, or too little is."""
    model_runner = runner.model_runner
    is_plain = (
        batch.forward_mode.is_extend_without_speculative()
        and type(model_runner.attn_backend).__name__ == BACKEND.rpartition(".")[2]
        and not model_runner.attn_backend.use_sliding_window_kv_pool
        and all(getattr(batch, name) is None for name in NOT_PLAIN)
        and not any(batch.lora_ids or ())
        and not any(batch.mm_inputs or ())
        and not batch.is_prefill_only
        and not batch.capture_hidden_mode.need_capture()
    )
    if not is_plain:
        return None
    lengths, prefixes = np.array(batch.extend_seq_lens_cpu), np.array(batch.extend_prefix_lens_cpu)
    shared = share(batch.input_ids.numpy(), lengths, prefixes)
    return shared if len(shared.computed) <= MAX_SHARE * len(shared.source) else None
