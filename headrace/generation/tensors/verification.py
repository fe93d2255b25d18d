"""Whether an engine holds the weights that it was given, told by checksums of its tensors. Pure but for reading files.

SGLang's `/weights_checker` hashes what lies in the engine's memory, tensor by tensor, on each rank. Its tensors are
made of the checkpoint's: fused (`qkv_proj`, `gate_up_proj`, the experts of a layer), tied, padded, or cast to float32.
Two things can be known of each:

- that it changed, on some rank, exactly if the bytes of what it is made of changed: on any device, under any
  parallelism. What is called by names that are not understood is held against the rest of the checkpoint as a whole;
- that its bytes are the file's: where one rank has all of it and the hash can be computed here (SHA-256 on a CPU,
  SGLang's own on CUDA, `tensor_hash`).
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
"""What SGLang stacks along the first dimension, in this order."""
EXPERTS = {"w13_weight": (("gate_proj", "up_proj"), ("w1", "w3")), "w2_weight": (("down_proj",), ("w2",))}
"""What it stacks of each expert, one after the other, by either of two conventions of names."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VOCABULARY_MULTIPLE = 64
"""SGLang pads the rows of both to it with zeros."""
MAX_CAST_BYTES = 1 << 20
"""What SGLang holds in float32 beside a bfloat16 model (decays, a router's bias) is small."""
Checksums = dict[str, str]
"""By the engine's tensors."""
Digests = Mapping[str, str]
"""By the checkpoint's tensors."""


class ConfirmedState(NamedTuple):
    """What the engine held, by rank, when what it had been given was this."""

    digests: Digests
    checksums: Sequence[Checksums]


class Comparison(NamedTuple):
    """Of two states of an engine: `contradiction` is "" or says what speaks against it; `num_compared` of the engine's
    tensors were held one by one against what they are made of, `unknown` are those whose names are not understood and
    that were held against the rest of the checkpoint as a whole."""

    mismatch: str
    num_compared: int
    unmatched: list[str]


def map_to_checkpoint(names: Collection[str], stored: Collection[str]) -> dict[str, list[str]]:
    """Of the engine's tensors `names` those that are made of the checkpoint's `stored`: of which, in their order."""
    parts = {name: _parts_of(name, stored) for name in names}
    return {name: found for name, found in parts.items() if found}


def compare_changes(given: Digests, held: Sequence[Checksums], before: ConfirmedState) -> Comparison:
    """Each of the engine's tensors must have changed since `before`, on some rank, exactly if what it is made of has.

    What `before` does not know of is not compared.
    """
    names = list(dict.fromkeys(name for rank in held for name in rank))
    parts = map_to_checkpoint(names, given)
    ranks = list(zip(held, before.checksums, strict=True))
    changed = {name for name in names if any(now.get(name) != then.get(name) for now, then in ranks)}
    anew = {name for name, digest in given.items() if name in before.digests and digest != before.digests[name]}
    known = {name: of for name, of in parts.items() if before.digests.keys() >= set(of)}
    wrong = [name for name, of in known.items() if (name in changed) == anew.isdisjoint(of)]
    if wrong:
        how = "has changed with the same bytes" if wrong[0] in changed else "is as before with other bytes"
        return Comparison(f"{len(wrong)} of its {len(known)} tensors contradict them: {wrong[0]} {how}", len(known), [])
    unknown = [name for name in names if name not in parts]
    rest = given.keys() - {part for of in parts.values() for part in of}
    is_known = bool(unknown and rest) and rest <= before.digests.keys()
    if is_known and changed.isdisjoint(unknown) != anew.isdisjoint(rest):
        how = "are as before with other bytes" if changed.isdisjoint(unknown) else "have changed with the same bytes"
        return Comparison(f"its tensors {unknown[0]} and {len(unknown) - 1} more {how}", len(known), unknown)
    return Comparison("", len(known), unknown if is_known else [])


def compare_bytes(folder: Path, names: Set[str], held: Checksums) -> tuple[str, int]:
    """What says that an engine on a CPU, on one rank, does not hold the bytes of the folder's tensors `names`, or "";
    and of how many of its own that is known."""
    stored = {entry.name: entry for entry in safetensors_entries(folder)}
    if missing := names - stored.keys():
        return f"{min(missing)} is no longer in {folder}", 0
    parts = map_to_checkpoint(held, stored)
    wrong = sorted(
        name
        for name, of in parts.items()
        if held[name] not in _possible_checksums([stored[part] for part in of], _sha256)
    )
    told = f"it holds other bytes for {len(wrong)} of {len(parts)} tensors, {wrong[0]} first" if wrong else ""
    return told, len(parts)


def sample_checksums(folder: Path, names: Collection[str], seed: int, max_bytes: int) -> dict[str, set[str]]:
    """The checksums that an engine on CUDA, on one rank, may tell of some of its tensors `names`, drawn by `seed`, of
    `max_bytes` together at most.

    Experts are left out: kernels for them may lay them out anew.
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
    """None if they are not all there."""
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
    """Of the bytes as they lie in the file, then of those by which SGLang may hold the same numbers."""
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
