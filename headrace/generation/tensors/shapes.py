"""Names, shapes and places of the tensors in a folder, read from the headers of its safetensors files.

SGLang dies of a truncated file or a wrong shape, and silently keeps the present weights of a missing tensor; so a
folder is held against the model that the engine runs before a swap begins.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class StoredTensor(NamedTuple):
    """A tensor in a file, and where its bytes lie there."""

    name: str
    dtype: str
    """As safetensors calls it: F32, BF16, …"""
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
    """What a swap must bring: the tensors of the checkpoint in `model`; none if it is not a folder here."""
    if not model.is_dir():
        return {}
    index = model / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    # Some checkpoints have their weights a second time, by other names, in a file that the index does not know.
    shapes = {e.name: e.shape for e in safetensors_entries(model) if files is None or e.path.name in files}
    config = model / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    if (settings | (settings.get("text_config") or {})).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # and some store the tied head a second time
    return shapes


def safetensors_shapes(folder: Path) -> Shapes:
    """Names and shapes of all tensors in the folder; raises `ValueError` on a torn file."""
    return {entry.name: entry.shape for entry in safetensors_entries(folder)}


def safetensors_entries(folder: Path) -> Iterator[StoredTensor]:
    """All tensors in the folder, from the files' headers; raises `ValueError` on a torn file."""
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
        raise ValueError(f"{path.stat().st_size} bytes are not the length its header tells")
    found = []
    for name, tensor in tensors.items():
        begin, end = tensor["data_offsets"]
        place = 8 + header_bytes + begin, end - begin
        found.append(StoredTensor(name, str(tensor["dtype"]), tuple(tensor["shape"]), path, *place))
    return found
