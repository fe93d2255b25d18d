"""Verifies by checksums of an engine's tensors that it holds the given weights. Pure, except for file reads.

SGLang's `/weights_checker` hashes the tensors in the engine's memory, on each rank. An engine's tensor is made from
tensors of the checkpoint: fused (`qkv_proj`, `gate_up_proj`, the experts of a layer), tied, padded, or cast to float32.
Two things can be checked:

- The tensor has changed, on some rank, exactly if the bytes of its parts in the checkpoint have changed. This works on
  any device, under any parallelism. Tensors with unknown names are compared as a whole with the rest of the checkpoint.
- The tensor has the bytes of the file. This works if one rank has all of the tensor and its hash can be computed here
  (SHA-256 on a CPU, SGLang's own on CUDA, `checksum`).
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headrace.generation.tensors.checksum import cuda_checksum
from headrace.generation.tensors.shapes import StoredTensor, safetensors_entries

HASH_CHARS = 16
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Tensors that SGLang stacks along the first dimension, with their parts in order."""
EXPERTS = {"w13_weight": (("gate_proj", "up_proj"), ("w1", "w3")), "w2_weight": (("down_proj",), ("w2",))}
"""Tensors that SGLang stacks over all experts, with the parts of one expert under either of two naming conventions."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VOCABULARY_MULTIPLE = 64
"""SGLang pads the number of rows of both to a multiple of this, with zeros."""
MAX_CAST_BYTES = 1 << 20
"""The tensors that SGLang holds in float32 in a bfloat16 model (decays, a router's bias) are smaller than this."""
CHANGED = "has changed, but its bytes are the same as before"
UNCHANGED = "has not changed, but its bytes have"
Checksums = dict[str, str]
"""By the name of the engine's tensor."""
Digests = Mapping[str, str]
"""By the name of the checkpoint's tensor."""


class ConfirmedState(NamedTuple):
    """The digests of a checkpoint, and the engine's checksums, by rank, when it held that checkpoint."""

    digests: Digests
    checksums: Sequence[Checksums]


class Comparison(NamedTuple):
    """The comparison of two states of an engine."""

    mismatch: str
    """The first mismatch; empty if there is none."""
    num_compared: int
    """Number of the engine's tensors that were compared one by one with their parts."""
    unmatched: list[str]
    """Tensors with unknown names, which were compared as a whole with the rest of the checkpoint."""


def map_to_checkpoint(names: Collection[str], stored: Collection[str]) -> dict[str, list[str]]:
    """The parts, in order, among the checkpoint's tensors `stored` of each of the engine's tensors `names`; a tensor
    without all its parts is left out."""
    parts = {name: _parts_of(name, stored) for name in names}
    return {name: found for name, found in parts.items() if found}


def compare_changes(digests: Digests, checksums: Sequence[Checksums], before: ConfirmedState) -> Comparison:
    """Checks that each of the engine's tensors has changed since `before`, on some rank, exactly if its parts have.

    Tensors with a part that `before` does not have are not compared.
    """
    names = list(dict.fromkeys(name for rank in checksums for name in rank))
    parts = map_to_checkpoint(names, digests)
    ranks = list(zip(checksums, before.checksums, strict=True))
    changed = {name for name in names if any(now.get(name) != then.get(name) for now, then in ranks)}
    new = {name for name, digest in digests.items() if name in before.digests and digest != before.digests[name]}
    known = {name: of for name, of in parts.items() if before.digests.keys() >= set(of)}
    wrong = [name for name, of in known.items() if (name in changed) == new.isdisjoint(of)]
    if wrong:
        how = CHANGED if wrong[0] in changed else UNCHANGED
        return Comparison(f"{len(wrong)} of its {len(known)} tensors do not match: {wrong[0]} {how}", len(known), [])
    unmatched = [name for name in names if name not in parts]
    rest = digests.keys() - {part for of in parts.values() for part in of}
    is_known = bool(unmatched and rest) and rest <= before.digests.keys()
    if is_known and changed.isdisjoint(unmatched) != new.isdisjoint(rest):
        how = UNCHANGED if changed.isdisjoint(unmatched) else CHANGED
        return Comparison(f"the group of {unmatched[0]} and {len(unmatched) - 1} more {how}", len(known), unmatched)
    return Comparison("", len(known), unmatched if is_known else [])


def compare_bytes(folder: Path, names: Set[str], checksums: Checksums) -> tuple[str, int]:
    """Compares the checksums of an engine on a CPU, with one rank, with the bytes of the folder's tensors `names`.

    Returns the first mismatch, or "", and the number of the engine's tensors that were compared.
    """
    stored = {entry.name: entry for entry in safetensors_entries(folder)}
    if missing := names - stored.keys():
        return f"{min(missing)} is no longer in {folder}", 0
    parts = map_to_checkpoint(checksums, stored)
    wrong = sorted(
        name
        for name, of in parts.items()
        if checksums[name] not in _possible_checksums([stored[part] for part in of], _sha256)
    )
    mismatch = f"it holds other bytes for {len(wrong)} of {len(parts)} tensors, {wrong[0]} first" if wrong else ""
    return mismatch, len(parts)


def sample_checksums(folder: Path, names: Collection[str], seed: int, max_bytes: int) -> dict[str, set[str]]:
    """The checksums that an engine on CUDA, with one rank, may report for a sample of its tensors `names`.

    The sample is drawn by `seed` and has at most `max_bytes`. It has no experts, because kernels may change their
    memory layout.
    """
    stored = {entry.name: entry for entry in safetensors_entries(folder)}
    parts = {name: of for name, of in map_to_checkpoint(names, stored).items() if ".experts." not in name}
    sizes = {name: sum(stored[part].num_bytes for part in of) for name, of in parts.items()}
    fitting = sorted(name for name, size in sizes.items() if size <= max_bytes)
    drawn, left_bytes = [], max_bytes
    for name in random.Random(seed).sample(fitting, len(fitting)):
        left_bytes -= sizes[name]
        if left_bytes < 0:
            break
        drawn.append(name)
    return {name: set(_possible_checksums([stored[part] for part in parts[name]], cuda_checksum)) for name in drawn}


def _parts_of(name: str, stored: Collection[str]) -> list[str]:
    """The parts of an engine's tensor, in order; empty if some are missing."""
    if name in stored:
        return [name]
    if name == HEAD:
        return [EMBEDDING] if EMBEDDING in stored else []
    if expert := re.fullmatch(r"(.+\.experts)\.(w13_weight|w2_weight)", name):
        return _experts(expert[1], EXPERTS[expert[2]], stored)
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            found = [name.replace(f".{fused}.", f".{part}.") for part in parts]
            return found if all(part in stored for part in found) else []
    return []


def _experts(layer: str, conventions: Iterable[Sequence[str]], stored: Collection[str]) -> list[str]:
    for parts in conventions:
        numbered = ([f"{layer}.{number}.{part}.weight" for part in parts] for number in itertools.count())
        whole = itertools.takewhile(lambda of: all(part in stored for part in of), numbered)
        if found := list(itertools.chain.from_iterable(whole)):
            return found
    return []


def _possible_checksums(parts: Sequence[StoredTensor], digest: Callable[[bytes], str]) -> Iterator[str]:
    """Yields the checksum of the bytes in the file, then of the other representations that SGLang may use."""
    payload = b"".join(part.read() for part in parts)
    yield digest(payload)
    if len(payload) <= MAX_CAST_BYTES and parts[0].dtype in ("BF16", "F16"):
        is_brain = parts[0].dtype == "BF16"
        numbers = np.frombuffer(payload, "<u2" if is_brain else "<f2")
        yield digest((numbers.astype("<u4") << 16 if is_brain else numbers.astype("<f4")).tobytes())
    if parts[0].name in (HEAD, EMBEDDING) and (missing := -parts[0].shape[0] % VOCABULARY_MULTIPLE):
        yield digest(payload + bytes(missing * len(payload) // parts[0].shape[0]))


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:HASH_CHARS]
