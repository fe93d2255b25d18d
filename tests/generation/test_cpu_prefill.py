"""Compares prefills that compute common prefixes once with the same prefills computed whole."""

import math
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.generation.engine.cpu.attention import BACKEND, extend
from headrace.generation.engine.cpu.prefill import UNSUPPORTED_FIELDS, attention, deduplicate, logits, prefill
from tests.generation.test_cpu_attention import DIM, HEADS, KV_HEADS, OPTIONS, SLOTS, refuse

VOCABULARY, LAYERS = 4, 2
HIDDEN = HEADS * DIM

SEQUENCES = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=8)
"""Of so few tokens that many begin alike."""


class TorchNativeAttnBackend:
    """SGLang's `forward_extend`, with one cache of keys and values per layer."""

    use_sliding_window_kv_pool = False

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.caches = [torch.full((2, SLOTS, KV_HEADS, DIM), math.nan) for _ in range(LAYERS)]

    def forward_extend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, batch: Any) -> Tensor:
        keys, values = self.caches[layer]
        keys[batch.out_cache_loc], values[batch.out_cache_loc] = key.view(-1, KV_HEADS, DIM), value.view_as(key)
        output = torch.empty_like(query)
        lengths = (batch.req_pool_indices, batch.seq_lens, batch.extend_prefix_lens, batch.extend_seq_lens)
        extend(
            *(refuse, self, query, output, keys, values, self.table, *lengths, batch.encoder_lens),
            **({"causal": True} | OPTIONS),
        )
        return output


@dataclass
class Batch:
    """The fields of SGLang's batch that are read."""

    input_ids: Tensor
    positions: Tensor
    out_cache_loc: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_prefix_lens: Tensor
    extend_seq_lens: Tensor
    forward_mode: Any = field(default_factory=lambda: SimpleNamespace(is_extend_without_speculative=lambda: True))
    capture_hidden_mode: Any = field(default_factory=lambda: SimpleNamespace(need_capture=lambda: False))
    is_prefill_only: bool = False
    lora_ids: list[str | None] | None = None
    mm_inputs: list[Any] | None = None
    input_embeds: None = None
    replace_embeds: None = None
    token_type_ids: None = None
    mrope_positions: None = None
    encoder_lens: None = None
    spec_info: None = None
    mamba_track_indices: None = None
    ngram_embedding_info: None = None
    engram_history: None = None
    global_num_tokens_cpu: None = None


class Runner:
    """SGLang's runner, with a model of random weights; counts the tokens that it computes."""

    def __init__(self, num_sequences: int) -> None:
        torch.manual_seed(0)
        self.weights = torch.randn(LAYERS, HIDDEN, HIDDEN + 2 * KV_HEADS * DIM) / math.sqrt(HIDDEN)
        self.embedding, self.places = torch.randn(VOCABULARY, HIDDEN), torch.randn(64, HIDDEN)
        self.backend = TorchNativeAttnBackend(torch.randperm(SLOTS)[: 16 * num_sequences].view(num_sequences, 16))
        self.model_runner = SimpleNamespace(attn_backend=self.backend)
        self.num_computed = 0

    def execute_extend(self, batch: Batch) -> Tensor:
        """States of the last tokens, `(B, HIDDEN)`."""
        self.num_computed += len(batch.input_ids)
        states = self.embedding[batch.input_ids] + self.places[batch.positions]
        for layer, weights in enumerate(self.weights):
            query, key, value = (states @ weights).split((HIDDEN, KV_HEADS * DIM, KV_HEADS * DIM), dim=-1)
            heads = (part.unflatten(1, (-1, DIM)) for part in (query, key, value))
            attended = attention(type(self.backend).forward_extend, self.backend, *heads, layer, batch)
            states = torch.tanh(states + attended.flatten(1))
        last: Tensor = logits(self.of_last, None, batch.input_ids, states, None, batch)
        return last

    @staticmethod
    def of_last(_processor: None, _tokens: Tensor, states: Tensor, _lm_head: None, batch: Batch) -> Tensor:
        return states[batch.extend_seq_lens.cumsum(0) - 1]


def batch_of(runner: Runner, sequences: list[list[int]], prefixes: list[int]) -> Batch:
    """The batch of the tokens behind the first `prefixes` tokens of each sequence."""
    table = runner.backend.table
    places = [torch.arange(before, len(one)) for one, before in zip(sequences, prefixes, strict=True)]
    lengths, before = torch.tensor([len(one) for one in places]), torch.tensor(prefixes)
    return Batch(
        input_ids=torch.cat([torch.tensor(one)[place] for one, place in zip(sequences, places, strict=True)]),
        positions=torch.cat(places),
        out_cache_loc=torch.cat([table[row, place] for row, place in enumerate(places)]),
        req_pool_indices=torch.arange(len(sequences)),
        seq_lens=before + lengths,
        extend_prefix_lens=before,
        extend_seq_lens=lengths,
    )


@settings(max_examples=100)
@given(SEQUENCES, st.data())
def test_tokens_are_shared_exactly_if_they_and_their_prefixes_are_equal(
    sequences: list[list[int]], data: st.DataObject
) -> None:
    prefixes = data.draw(st.lists(st.sampled_from((0, 0, 3)), min_size=len(sequences), max_size=len(sequences)))
    computed, sources = deduplicate(
        *(np.array(part) for part in ([*chain(*sequences)], [len(one) for one in sequences], prefixes))
    )
    beginnings = [
        (row if before else None, tuple(one[: place + 1]))
        for row, (one, before) in enumerate(zip(sequences, prefixes, strict=True))
        for place in range(len(one))
    ]
    by_source: dict[int, set[Any]] = {}
    for source, beginning in zip(sources.tolist(), beginnings, strict=True):
        by_source.setdefault(source, set()).add(beginning)
    assert len(by_source) == len(computed) == len(set(beginnings))
    assert all(len(same) == 1 for same in by_source.values())
    assert [beginnings[place] for place in computed] == [by_source[i].pop() for i in range(len(computed))]


@settings(max_examples=100)
@given(SEQUENCES, st.integers(1, 4))
def test_a_deduplicated_prefill_equals_the_whole_one(sequences: list[list[int]], group_size: int) -> None:
    """Compares states of last tokens, keys and values; then of a second prefill behind the first one."""
    sequences = [one for one in sequences for _ in range(group_size)]
    whole, shared = Runner(len(sequences)), Runner(len(sequences))
    longer = [[*one, *one[:3]] for one in sequences]
    for tokens, prefixes in ((sequences, [0] * len(sequences)), (longer, [len(one) for one in sequences])):
        batch = batch_of(whole, tokens, prefixes)
        expected = whole.execute_extend(batch)
        assert torch.allclose(prefill(Runner.execute_extend, shared, batch), expected, atol=1e-5)
        for cache, expected_cache in zip(shared.backend.caches, whole.backend.caches, strict=True):
            assert torch.allclose(cache, expected_cache, atol=1e-5, equal_nan=True)
    if group_size > 1:
        assert shared.num_computed <= whole.num_computed - (group_size - 1) * sum(map(len, sequences)) // group_size


@pytest.mark.parametrize("field_name", [*UNSUPPORTED_FIELDS, "lora_ids", "mm_inputs", "is_prefill_only"])
def test_a_prefill_that_is_not_plain_text_is_left_to_sglang(field_name: str) -> None:
    runner = Runner(2)
    batch = batch_of(runner, [[1, 2], [1, 2]], [0, 0])
    setattr(batch, field_name, ["something"])
    assert prefill(lambda _, given: given, runner, batch) is batch


def test_another_attention_backend_or_too_few_shared_tokens_is_left_to_sglang() -> None:
    assert BACKEND.endswith(TorchNativeAttnBackend.__name__)
    runner = Runner(2)
    different = batch_of(runner, [[1, 2, 3], [2, 2, 3]], [0, 0])
    assert prefill(lambda _, given: given, runner, different) is different
    alike = batch_of(runner, [[1, 2, 3], [1, 2, 3]], [0, 0])
    assert len(prefill(lambda _, given: given, runner, alike).input_ids) == 3
    runner.model_runner.attn_backend = object()
    assert prefill(lambda _, given: given, runner, alike) is alike


def test_a_failed_prefill_does_not_affect_the_next() -> None:
    runner = Runner(2)
    batch = batch_of(runner, [[1, 2, 3], [1, 2, 3]], [0, 0])

    def fail(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        prefill(fail, runner, batch)
    states = torch.zeros(1)
    assert logits(lambda *given: given[2], None, torch.zeros(1), states) is states
