"""Compares the batched attention with one sequence at a time, in plain matrix products."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.generation.engine.cpu.attention import MAX_SCORES, _length_buckets, decode, extend

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 8, 512


def refuse(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the original was called")


def make_cache(seq_lens: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, the slot table and the rows of the sequences; unused slots are NaN."""
    keys, values = torch.full((2, SLOTS, KV_HEADS, DIM), math.nan)
    order = torch.randperm(SLOTS)
    table = torch.randint(0, SLOTS, (len(seq_lens) + 3, 64))
    rows = torch.randperm(len(seq_lens) + 3)[: len(seq_lens)]
    start = 0
    for row, length in zip(rows.tolist(), seq_lens, strict=True):
        slots = order[start : start + length]
        start += length
        table[row, :length] = slots
        keys[slots], values[slots] = torch.randn(2, length, KV_HEADS, DIM)
    return keys, values, table, rows


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last `len(query)` tokens of one sequence `(Q, HEADS, DIM)` to its keys `(K, KV_HEADS, DIM)`."""
    keys, values = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1).double() for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) / math.sqrt(DIM)
    places = torch.arange(len(keys))
    first = len(keys) - len(query)
    scores = scores.masked_fill(places > first + torch.arange(len(query))[:, None], -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


OPTIONS: dict[str, Any] = {
    "scaling": 1 / math.sqrt(DIM),
    "enable_gqa": True,
    "is_cross_attn": False,
    "sliding_window_size": None,
}


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 100))
def test_decode_equals_one_sequence_at_a_time(seq_lens: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    keys, values, table, rows = make_cache(seq_lens)
    query = torch.randn(len(seq_lens), HEADS, DIM)
    output = torch.empty_like(query)
    decode(refuse, None, query, output, keys, values, table, rows, torch.tensor(seq_lens), causal=False, **OPTIONS)
    for index, (row, length) in enumerate(zip(rows.tolist(), seq_lens, strict=True)):
        slots = table[row, :length]
        expected = reference(query[index : index + 1], keys[slots], values[slots])[0]
        assert torch.allclose(output[index].double(), expected, atol=1e-5)


def test_a_few_long_sequences_do_not_make_all_of_them_long() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([40, 500, 35, 30, 460, 33] + [38] * 20)
    parts = list(_length_buckets(lengths))
    assert [sorted(lengths[part].tolist()) for part in parts] == [[460, 500], [30, 33, 35] + [38] * 20 + [40]]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    (all_of_them,) = _length_buckets(torch.tensor([20, 3, 7]))
    assert all_of_them.tolist() == [0, 2, 1]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 100))
def test_decode_in_parts_equals_decode_at_once(seq_lens: list[int], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.generation.engine.cpu.attention.MIN_SAVED_TOKENS", 0)
        test_decode_equals_one_sequence_at_a_time.hypothesis.inner_test(seq_lens, seed)  # type: ignore[attr-defined]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8), st.integers(0, 100))
def test_extend_equals_one_sequence_at_a_time(lengths: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    prefix, new = (torch.tensor(column) for column in zip(*lengths, strict=True))
    keys, values, table, rows = make_cache((prefix + new).tolist())
    query = torch.randn(int(new.sum()), HEADS, DIM)
    output = torch.empty_like(query)
    extend(refuse, None, query, output, keys, values, table, rows, prefix + new, prefix, new, causal=True, **OPTIONS)
    start = 0
    for row, (before, count) in zip(rows.tolist(), lengths, strict=True):
        slots = table[row, : before + count]
        expected = reference(query[start : start + count], keys[slots], values[slots])
        assert torch.allclose(output[start : start + count].double(), expected, atol=1e-5)
        start += count


def test_unsupported_cases_go_to_the_original() -> None:
    query, lens = torch.randn(1, HEADS, DIM), torch.tensor([1])
    keys, values, table, rows = make_cache([1])
    sentinel = torch.zeros(0)

    def original(*_: Any, **__: Any) -> Tensor:
        return sentinel

    windowed = OPTIONS | {"sliding_window_size": 4}
    plain = (None, query, torch.empty_like(query), keys, values, table, rows, lens)
    assert decode(original, *plain, lens, causal=False, **OPTIONS) is sentinel
    assert decode(original, *plain, causal=False, **windowed) is sentinel
    none_before = (torch.tensor([0]), lens)
    assert extend(original, *plain, *none_before, causal=True, **windowed) is sentinel
    assert extend(original, *plain, *none_before, causal=False, **OPTIONS) is sentinel


def test_a_prefill_too_long_to_pad_goes_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SCORES > 256 * 256
    monkeypatch.setattr("headrace.generation.engine.cpu.attention.MAX_SCORES", 0)
    query, lens = torch.randn(1, HEADS, DIM), torch.tensor([1])
    keys, values, table, rows = make_cache([1])
    sentinel = torch.zeros(0)
    arguments = (None, query, torch.empty_like(query), keys, values, table, rows, lens, torch.tensor([0]), lens)
    assert extend(lambda *_, **__: sentinel, *arguments, causal=True, **OPTIONS) is sentinel
