"""Prefills of SGLang on a CPU that compute common prefixes once: a group's prompt, a chat template.

The hidden state of a token depends only on the token and those before it. So of all tokens of a batch that are equal
after equal prefixes, only one goes through embeddings, projections and MLPs. Attention runs on all of them: every
sequence has its own keys and values, and SGLang's memory layout is unchanged. A prefix cache does not help where the
completions of a group arrive together; with one, sequences behind cached tokens are left as they are.

Installed by SGLang's plugin hooks. Anything beyond a plain prefill of text (LoRA, images, states beside keys and
values, …) is left to SGLang. Imported in SGLang's processes only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.generation.engine.cpu.attention import BACKEND

MAX_SHARE = 0.9
"""If more than this share of the tokens must be computed, the prefill is left to SGLang."""
UNSUPPORTED_FIELDS = (
    *("input_embeds", "replace_embeds", "token_type_ids", "mrope_positions", "encoder_lens", "spec_info"),
    *("mamba_track_indices", "ngram_embedding_info", "engram_history", "global_num_tokens_cpu"),
)
"""Fields of a batch that are None in a plain prefill of text."""


class AttentionBatch(NamedTuple):
    """The fields of SGLang's batch that attention reads, under SGLang's names."""

    out_cache_loc: Tensor
    """`(N,)`: the cache slots for the keys and values of all tokens."""
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_prefix_lens: Tensor
    extend_seq_lens: Tensor
    encoder_lens: None = None


class DeduplicatedPrefill(NamedTuple):
    """The prefill in progress. U of the N tokens of its batch are computed; M tokens belong to sequences that have any
    of those."""

    source: Tensor
    """`(N,)` int64: for each token of the batch, the index of the computed token that it equals."""
    rows: AttentionBatch
    """The sequences with computed tokens."""
    query_source: Tensor
    """`(M,)` int64: for each token of `rows`, the index of the computed token that it equals."""
    outputs: Tensor
    """`(U,)` int64: the index of each computed token among those of `rows`."""


_current: DeduplicatedPrefill | None = None
"""A single value suffices, because a scheduler computes one prefill at a time."""


def prefill(original: Callable[..., Any], runner: Any, batch: Any, *arguments: Any) -> Any:
    """Calls SGLang's prefill runner with the distinct tokens only."""
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
    """A layer's attention in a prefill: `query`, `key`, `value` and the result are `(U, …)`. All tokens get keys and
    values; only sequences with a computed token send queries."""
    if _current is None:
        return original(backend, query, key, value, layer, batch, *arguments, **options)
    source, rows, query_source, outputs = _current
    return original(backend, query[query_source], key[source], value[source], layer, rows, *arguments, **options)[
        outputs
    ]


def logits(
    original: Callable[..., Any], processor: Any, tokens: Tensor, states: Tensor, *others: Any, **named: Any
) -> Any:
    """SGLang's logits. `states` `(U, hidden)` are expanded to the whole batch, as it reads each sequence's last."""
    whole = states if _current is None else states[_current.source]
    return original(processor, tokens, whole, *others, **named)


def deduplicate(tokens: np.ndarray, lengths: np.ndarray, prefixes: np.ndarray) -> tuple[Tensor, Tensor]:
    """The positions `(U,)` of the tokens to compute, and for each token `(N,)` the index of the computed token that it
    equals; int64.

    `tokens` `(N,)` are those of B sequences, concatenated; `lengths` `(B,)` are their numbers. A sequence whose entry
    of `prefixes` `(B,)` is not 0 shares nothing, because the tokens before it are unknown here.
    """
    starts, source = lengths.cumsum() - lengths, np.full(len(tokens), -1)
    before = np.where(prefixes == 0, 0, -1 - np.arange(len(lengths)))  # one number per distinct prefix
    rows, computed, num_computed = np.arange(len(lengths)), [], 0
    for depth in range(int(lengths.max())):
        rows = rows[lengths[rows] > depth]
        places = starts[rows] + depth
        _, first, which = np.unique((before[rows] << 32) + tokens[places], return_index=True, return_inverse=True)
        if len(first) == len(rows):  # all later tokens are distinct
            break
        computed.append(places[first])
        source[places] = num_computed + which
        num_computed += len(first)
        before[rows] = source[places] + 1
    rest = np.flatnonzero(source < 0)
    source[rest] = num_computed + np.arange(len(rest))
    return torch.from_numpy(np.concatenate([*computed, rest])), torch.from_numpy(source)


def _prefill(batch: Any, computed: Tensor, source: Tensor) -> DeduplicatedPrefill:
    """Selects the sequences with a computed token; the others send no queries."""
    row_of = torch.arange(len(batch.seq_lens)).repeat_interleave(batch.extend_seq_lens)
    asking = row_of[computed].unique()
    rows = AttentionBatch(batch.out_cache_loc, *(getattr(batch, name)[asking] for name in AttentionBatch._fields[1:5]))
    places = torch.isin(row_of, asking).nonzero().flatten()
    return DeduplicatedPrefill(source, rows, source[places], torch.searchsorted(places, computed))


def _is_plain(attention_backend: Any, batch: Any) -> bool:
    """Whether the batch is a plain prefill of text, with the backend whose attention is hooked."""
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
