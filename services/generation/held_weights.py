"""Whether an engine holds the weights that it was given, told by checksums of its tensors.

SGLang's `/weights_checker` hashes what lies in the engine's memory. On a CPU the hash is the SHA-256 of a tensor's
bytes: each tensor, fused ones included, is held against the file bit for bit. On a GPU it is a kernel's own, and under
tensor parallelism a tensor lies in parts: there the checksums must have changed since the last confirmed version
exactly if the file's bytes have. Tensors that the engine calls by other names than the file are not compared.
"""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from services.generation.tensor_shapes import StoredTensor, safetensors_entries

HASH_CHARS = 16
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What SGLang stacks along the first dimension, in this order."""
Hashes = dict[str, str]


def file_hashes(folder: Path, names: Collection[str]) -> Hashes:
    """SHA-256, 16 hex digits, of those of the engine's tensors `names` whose bytes the safetensors files have."""
    places = {entry.name: entry for entry in safetensors_entries(folder)}
    parts = {name: [part for part in _parts(name) if part in places] for name in names}
    return {name: _hash([places[part] for part in found]) for name, found in parts.items() if found}


def contradiction(
    given: Hashes, held: Sequence[Hashes], *, is_exact: bool, confirmed: tuple[Hashes, Sequence[Hashes]] | None
) -> str:
    """What says that the engine, with checksums `held` by rank, does not hold the file's tensors `given`, or "".

    `is_exact`: the engine's hash is the file's; else both are held against the last confirmed pair, if there is one.
    """
    if is_exact:
        wrong = sorted({name for rank in held for name in rank.keys() & given if rank[name] != given[name]})
        return f"it holds other bytes for {len(wrong)} of {len(given)} tensors, {wrong[0]} first" if wrong else ""
    if given and confirmed is not None and (given == confirmed[0]) != (list(held) == list(confirmed[1])):
        changed = "have changed with the same file" if given == confirmed[0] else "are as before with another file"
        return f"the checksums of its tensors {changed}"
    return ""


def _parts(name: str) -> list[str]:
    """The tensor itself, or those of a checkpoint that it is made of."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return [name, *(name.replace(f".{fused}.", f".{part}.") for part in parts)]
    return [name]


def _hash(places: list[StoredTensor]) -> str:
    digest = hashlib.sha256()
    for place in places:
        with place.path.open("rb") as file:
            file.seek(place.start)
            digest.update(file.read(place.num_bytes))
    return digest.hexdigest()[:HASH_CHARS]
