"""Computes from a tensor's bytes the checksum that SGLang's `/weights_checker` reports for it on CUDA.

SGLang 0.5.23 uses a Triton kernel (`sglang/kernels/ops/memory/gpu_tensor_hash.py`). It mixes each 32-bit word with its
index, sums the words of each tile, hashes the sums and adds them up, all in unsigned arithmetic, so that the result
here is exact. The speed is about 0.5 GB a second on one core, enough for a sample of the tensors.
"""

import numpy as np

MAX_BYTES = 4 << 30
"""The kernel's indices have 32 bits; longer tensors are not hashed here."""
TILE_WORDS = 8192
_BLOCK_WORDS = 8 * TILE_WORDS
_SEED = 0x243F6A88
_LANES = (
    (0x27D4EB2D, 15, _SEED),
    (0x165667B1, 13, (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF),
)
"""For each of the two sums: the factor of an index, the number of bits that it is rotated by, and the addend."""
_MASK = (1 << 64) - 1


def cuda_checksum(payload: bytes | memoryview) -> str:
    """The checksum, 16 hex digits, of the bytes of a contiguous tensor; at most `MAX_BYTES`."""
    assert len(payload) <= MAX_BYTES, f"{len(payload)} bytes"
    if not len(payload):
        return f"{0:016x}"
    whole = len(payload) // 4 * 4
    words = np.frombuffer(payload[:whole], "<u4")
    if whole < len(payload):
        last = int.from_bytes(payload[whole:], "little")
        words = np.append(words, np.uint32(last))
    total = sum(_tiles(words, first) for first in range(0, len(words), _BLOCK_WORDS))
    return f"{_finish64(total & _MASK):016x}"


def _tiles(words: np.ndarray, first: int) -> int:
    """The sum of the tiles' hashes of one block, which begins at word `first`."""
    block = words[first : first + _BLOCK_WORDS]
    places = np.arange(first, first + len(block), dtype=np.uint32)
    starts = np.arange(0, len(block), TILE_WORDS)
    num_bytes = np.uint32(4 * len(words) & 0xFFFFFFFF)
    high, low = (
        _finish32(np.add.reduceat(_mixed(block, places, *lane), starts, dtype=np.uint32) ^ num_bytes) for lane in _LANES
    )
    return (int(high.sum(dtype=np.uint64)) << 32) + int(low.sum(dtype=np.uint64))


def _mixed(words: np.ndarray, places: np.ndarray, factor: int, turn: int, seed: int) -> np.ndarray:
    mixed = places * np.uint32(factor)
    mixed += np.uint32(seed)
    mixed ^= (places << np.uint32(turn)) | (places >> np.uint32(32 - turn))
    mixed ^= words
    return _finish32(mixed)


def _finish32(words: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3, in place."""
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return words


def _finish64(word: int) -> int:
    """The finalizer of SplitMix64."""
    word ^= word >> 30
    word = word * 0xBF58476D1CE4E5B9 & _MASK
    word ^= word >> 27
    word = word * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31
