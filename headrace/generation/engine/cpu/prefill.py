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

from headrace.generation.engine.cpu.attention import BACKEND

MAX_SHARE = 0.9
"""Of the tokens that are computed: above it, too little is saved."""
UNSUPPORTED_FIELDS = (
    *("input_embeds", "replace_embeds", "token_type_ids", "mrope_positions", "encoder_lens", "spec_info"),
    *("mamba_track_indices", "ngram_embedding_info", "engram_history", "global_num_tokens_cpu"),
)
"""Fields of a batch that say nothing in a plain prefill of text."""


class AttentionBatch(NamedTuple):
    """All that attention reads of a batch; its fields are SGLang's."""

    out_cache_loc: Tensor
    """`(N,)`: where keys and values of all tokens go."""
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_prefix_lens: Tensor
    extend_seq_lens: Tensor
    encoder_lens: None = None


class DeduplicatedPrefill(NamedTuple):
    """One that goes on: U of the N tokens of its batch are computed, M are of sequences with any of these."""

    source: Tensor
    """`(N,)` int64: for each token of the batch, which of the computed ones it equals."""
    rows: AttentionBatch
    """The sequences with computed tokens."""
    query_source: Tensor
    """`(M,)` int64: for each token of `rows`, which of the computed ones it equals."""
    outputs: Tensor
    """`(U,)` int64: where each computed token stands among those of `rows`."""


_current: DeduplicatedPrefill | None = None
"""A scheduler computes one at a time."""


def prefill(original: Callable[..., Any], runner: Any, batch: Any, *arguments: Any) -> Any:
    """SGLang's runner of a prefill, given the tokens that are computed."""
    global _current
    if not _is_plain(runner.model_runner.attn_backend, batch):
        return original(runner, batch, *arguments)
    ids, lengths, prefixes = batch.input_ids, batch.extend_seq_lens, batch.extend_prefix_lens
    computed, source = deduplicate(ids.numpy(), lengths.numpy(), prefixes.numpy())
    if len(computed) > MAX_SHARE * len(source):
        return original(runner, batch, *arguments)
    _current = _prefill(batch, computed, source)
    narrowed = {name: getattr(batch, name)[computed] for name in ("input_ids", "positions", "out_cache_loc")}
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
    source, rows, query_source, outputs = _current
    return original(backend, query[query_source], key[source], value[source], layer, rows, *arguments, **options)[
        outputs
    ]


def logits(
    original: Callable[..., Any], processor: Any, tokens: Tensor, states: Tensor, *others: Any, **named: Any
) -> Any:
    """SGLang's logits, given `states` `(U, hidden)` as of the whole batch: it looks for the last of each sequence."""
    whole = states if _current is None else states[_current.source]
    return original(processor, tokens, whole, *others, **named)


def deduplicate(tokens: np.ndarray, lengths: np.ndarray, prefixes: np.ndarray) -> tuple[Tensor, Tensor]:
    """The places `(U,)` of the tokens that are computed, and for each token `(N,)` which of these it equals; int64.

    `tokens` `(N,)` are of B sequences one after another, `lengths` `(B,)` of each; what stands before those whose
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
    return torch.from_numpy(np.concatenate([*computed, rest])), torch.from_numpy(source)


def _prefill(batch: Any, computed: Tensor, source: Tensor) -> DeduplicatedPrefill:
    """Sequences of which nothing is computed need not ask."""
    row_of = torch.arange(len(batch.seq_lens)).repeat_interleave(batch.extend_seq_lens)
    asking = row_of[computed].unique()
    rows = AttentionBatch(batch.out_cache_loc, *(getattr(batch, name)[asking] for name in AttentionBatch._fields[1:5]))
    places = torch.isin(row_of, asking).nonzero().flatten()
    return DeduplicatedPrefill(source, rows, source[places], torch.searchsorted(places, computed))


def _is_plain(attention_backend: Any, batch: Any) -> bool:
    """Whether it is a prefill of text alone, with the attention that `attention` is put around."""
    return (
        batch.forward_mode.is_extend_without_speculative()
        and type(attention_backend).__name__ == BACKEND.rpartition(".")[2]
        and not attention_backend.use_sliding_window_kv_pool
        and all(getattr(batch, name) is None for name in UNSUPPORTED_FIELDS)
        and not any(batch.lora_ids or ())
        and not any(batch.mm_inputs or ())
        and not batch.is_prefill_only
        and not batch.capture_hidden_mode.need_capture()
    )


HOOKS = {
    "sglang.srt.model_executor.runner.eager_runner.EagerRunner._execute_extend": prefill,
    f"{BACKEND}.forward_extend": attention,
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward": logits,
}
