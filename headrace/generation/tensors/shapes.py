"""Reads names, shapes and offsets of a folder's tensors from the headers of its safetensors files.

SGLang crashes on a truncated file or a wrong shape, and silently keeps the current weights of a missing tensor. So a
folder is compared with the model that the engine runs before a swap begins.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class StoredTensor(NamedTuple):
    """A tensor in a file, and the offset of its bytes."""

    name: str
    dtype: str
    """The name in safetensors: F32, BF16, …"""
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.num_bytes)


Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model: Path) -> Shapes:
    """The tensors that a swap must contain: those of the checkpoint in `model`; empty if that folder does not exist."""
    if not model.is_dir():
        return {}
    index = model / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    # Some checkpoints store their weights a second time, under other names, in a file that is not in the index.
    shapes = {e.name: e.shape for e in safetensors_entries(model) if files is None or e.path.name in files}
    config = model / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    if (settings | (settings.get("text_config") or {})).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # some checkpoints store the tied head a second time
    return shapes


def safetensors_shapes(folder: Path) -> Shapes:
    """Names and shapes of all tensors in the folder; raises `ValueError` on a truncated file."""
    return {entry.name: entry.shape for entry in safetensors_entries(folder)}


def safetensors_entries(folder: Path) -> Iterator[StoredTensor]:
    """All tensors in the folder, from the files' headers; raises `ValueError` on a truncated file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            yield from _entries(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _entries(path: Path) -> list[StoredTensor]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        size_bytes = path.stat().st_size - 8 - header_bytes
        tensors = json.loads(file.read(header_bytes)) if size_bytes >= 0 else {}
    tensors.pop("__metadata__", None)
    if size_bytes != max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0):
        raise ValueError(f"its {path.stat().st_size} bytes are not the length in its header")
    found = []
    for name, tensor in tensors.items():
        begin, end = tensor["data_offsets"]
        start, num_bytes = 8 + header_bytes + begin, end - begin
        found.append(StoredTensor(name, str(tensor["dtype"]), tuple(tensor["shape"]), path, start, num_bytes))
    return found
