"""Deltas are exact for any bits, small where little has changed, and refuse what no encoder has made."""

import contextlib
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.weights.delta import Bits, DeltaError, Patch, apply_patch, changed_indices, make_patch


def round_trip(current: Bits, base: Bits | None) -> Patch:
    patch, frames = make_patch(current, base)
    out = np.empty_like(current)
    apply_patch(patch, memoryview(b"".join(frames)), base, out)
    assert np.array_equal(out, current)
    return patch


def changed(base: Bits, share: float, rng: np.random.Generator, by: int | None = 1) -> Bits:
    """A random `share` of the places, up or down by `by`, or to anything."""
    places = np.flatnonzero(rng.random(len(base)) < share)
    current = base.copy()
    if by is None:
        current[places] = rng.integers(0, np.iinfo(base.dtype).max, len(places), base.dtype, endpoint=True)
    else:
        up = rng.integers(0, 2, len(places)).astype(bool)
        step = base.dtype.type(by)
        current[places] = np.where(up, current[places] + step, current[places] - step)
    return current


def bfloat16_weights(num_items: int, rng: np.random.Generator) -> Bits:
    return (rng.normal(0, 0.02, num_items).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=150)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
    num_items=st.integers(0, 3000),
    share=st.sampled_from([0.0, 0.001, 0.02, 0.09, 0.5, 1.0]),
    by=st.sampled_from([1, 2, 100, None]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_change_of_any_bits_comes_back(dtype: Any, num_items: int, share: float, by: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, np.iinfo(dtype).max, num_items, dtype, endpoint=True)
    current = changed(base, share, rng, by)
    assert np.array_equal(changed_indices(current, base), np.flatnonzero(current != base))
    round_trip(current, base)
    assert round_trip(current, None).method == "full"


@pytest.mark.parametrize(("share", "share_of_bytes"), [(0.0, 0.0), (0.015, 0.009), (0.5, 0.13), (1.0, 0.1)])
def test_a_change_by_one_unit_is_small_however_many_places_it_has(share: float, share_of_bytes: float) -> None:
    rng = np.random.default_rng(0)
    base = bfloat16_weights(100_000, rng)
    patch = round_trip(changed(base, share, rng), base)
    assert patch.method == ("dense" if share > 0.1 else "sparse" if share else "same")
    assert patch.num_bytes <= share_of_bytes * base.nbytes


def test_what_has_nothing_in_common_is_sent_in_full() -> None:
    rng = np.random.default_rng(0)
    current, base = bfloat16_weights(100_000, rng), rng.integers(0, 2**16, 100_000, np.uint16)
    patch = round_trip(current, base)
    assert patch.method == "full" and patch.num_bytes < 0.75 * current.nbytes, "exponents are compressed"


@pytest.mark.parametrize("share", [0.01, 0.015, 0.03])
def test_a_sparse_change_takes_little_more_than_its_entropy(share: float) -> None:
    """Whether a place has changed, by a random `share`, and in which direction (Shannon's binary entropy)."""
    rng = np.random.default_rng(1)
    base = bfloat16_weights(4_000_000, rng)
    patch = round_trip(changed(base, share, rng), base)
    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share) + share
    assert bits / 8 * len(base) < patch.num_bytes < 1.03 * bits / 8 * len(base)


def test_one_change_in_a_million_takes_bytes_not_kilobytes() -> None:
    base = np.zeros(3_000_000, np.uint16)
    current = base.copy()
    current[[999_999, 2_999_999]] = 7, 9
    assert round_trip(current, base).num_bytes < 150


def test_bits_that_numbers_do_not_tell_apart_are_kept() -> None:
    """Zeros of both signs, NaNs with their payloads, infinities."""
    base = np.array([0x0000, 0x8000, 0x7FC0, 0x7FC1, 0x7F80, 0xFF80, 0xFFFF, 0x0001], np.uint16)
    for shift in range(len(base)):
        round_trip(np.roll(base, shift), base)


def sparse_case() -> tuple[Patch, bytes, Bits]:
    rng = np.random.default_rng(2)
    base = bfloat16_weights(2000, rng)
    patch, frames = make_patch(changed(base, 0.02, rng), base)
    assert patch.method == "sparse"
    return patch, b"".join(frames), base


def refused(patch: Patch, content: bytes, base: Bits | None, num_items: int) -> str:
    with pytest.raises(DeltaError) as caught:
        apply_patch(patch, memoryview(content), base, np.empty(num_items, np.uint16))
    return str(caught.value)


def frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"frame_bytes": []}, "expected 4"),
        ({"frame_bytes": [-1, 1, 1, 1]}, "expected 4"),
        ({"frame_bytes": [1, 1, 1, 1]}, "expected 4"),
        ({"method": "full"}, "expected 2"),
        ({"method": "dense"}, "expected 2"),
        ({"num_changed": 0}, "expected 1 to 2000"),
        ({"num_changed": 2001}, "expected 1 to 2000"),
        ({"num_changed": 1 << 60}, "expected 1 to 2000"),
        ({"num_changed": 3}, "expected"),
    ],
)
def test_a_patch_that_lies_is_refused(changes: dict[str, object], problem: str) -> None:
    patch, content, base = sparse_case()
    assert problem in refused(msgspec.structs.replace(patch, **changes), content, base, len(base))


def test_only_full_needs_no_base() -> None:
    patch, content, base = sparse_case()
    assert "no base" in refused(patch, content, None, len(base))


@pytest.mark.parametrize(
    ("gaps", "problem"),
    [
        (b"\x05\xff", "gaps"),
        (b"\xff\xff\xff", "a frame of 3 bytes"),
        (b"\xff\xff", "0 gaps"),
        (b"\xfe", "index 254, expected below 100"),
        (b"", "a frame of 0 bytes"),
    ],
)
def test_gaps_that_lead_nowhere_are_refused(gaps: bytes, problem: str) -> None:
    frames = [frame(gaps), frame(b"\x00"), frame(b"\x00"), frame(b"\x00")]
    patch = Patch("sparse", 1, [len(one) for one in frames])
    num_items = 300 if len(gaps) > 1 else 100
    assert problem in refused(patch, b"".join(frames), np.zeros(num_items, np.uint16), num_items)


def test_a_frame_that_would_fill_the_memory_is_refused_unopened() -> None:
    bomb = frame(b"\x00" * (1 << 26))
    patch = Patch("full", 0, [len(bomb)] * 2)
    assert f"a frame of {1 << 26} bytes, expected 100 to 100" in refused(patch, bomb * 2, None, 100)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_bytes_are_refused_or_give_a_tensor(data: st.DataObject) -> None:
    """Nothing else is ever raised; whether the tensor is the right one its checksum tells."""
    patch, content, base = sparse_case()
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    out = np.empty_like(base)
    with contextlib.suppress(DeltaError):
        apply_patch(patch, memoryview(bytes(mutated)), base, out)


def test_the_wrong_base_gives_another_tensor() -> None:
    patch, content, base = sparse_case()
    out = np.empty_like(base)
    apply_patch(patch, memoryview(content), base + np.uint16(1), out)
    assert not np.array_equal(out, base)
