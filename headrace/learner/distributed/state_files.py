"""The tensors of a learner's checkpoint: one file per rank, with that rank's rows, readable by any number of ranks.

Of a tensor of D rows, rank r of N holds the rows from `r * ceil(D / N)` up to the next rank's first, as FSDP2 shards
them, so that the concatenated files are the whole tensor. Scalars are the same in all files; each rank has its own
random state. The format is safetensors, without pickle, so that any tool reads it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from headrace.common.process.atomic_files import FileEntry, file_entry, fsync_path

STATE_FILE = "state.safetensors"
RANDOM_STATE_PREFIX = "random."
"""Prefix of the names of random states."""


def write_state(folder: Path, tensors: Mapping[str, Tensor], rank: int = 0, count: int = 1) -> dict[str, FileEntry]:
    """Writes one rank's contiguous tensors durably; returns the file's name and checksum. Raises `OSError` or
    `SafetensorError`."""
    path = folder / (STATE_FILE if count == 1 else f"state-{rank + 1:05d}-of-{count:05d}.safetensors")
    save_file(dict(tensors), path)
    fsync_path(path)
    return {path.name: file_entry(path)}


def read_state(folder: Path, files: Sequence[str], rank: int = 0, count: int = 1) -> dict[str, Tensor]:
    """Reads one rank's tensors from all `files` of a checkpoint; a rank above the number of files gets no random
    state."""
    with contextlib.ExitStack() as stack:
        parts: list[Any] = [stack.enter_context(safe_open(folder / name, "pt")) for name in sorted(files)]
        names = [name for name in parts[0].keys() if not name.startswith(RANDOM_STATE_PREFIX)]  # noqa: SIM118 - no dict
        tensors = {name: _rows([part.get_tensor(name) for part in parts], rank, count) for name in names}
        if rank < len(parts):
            own = [name for name in parts[rank].keys() if name.startswith(RANDOM_STATE_PREFIX)]  # noqa: SIM118
            tensors |= {name: parts[rank].get_tensor(name) for name in own}
    return tensors


def rows_of(num_rows: int, rank: int, count: int) -> range:
    """The rows of a tensor that a rank holds; the last ranks may hold none."""
    each = -(-num_rows // count)
    return range(min(num_rows, rank * each), min(num_rows, (rank + 1) * each))


def _rows(parts: list[Tensor], rank: int, count: int) -> Tensor:
    """One rank's rows of the concatenated `parts`; these are views of mapped files, so only those rows are read."""
    if parts[0].ndim == 0 or (len(parts) == 1 and count == 1):
        return parts[0]
    wanted = rows_of(sum(len(part) for part in parts), rank, count)
    found, first = [], 0
    for part in parts:
        start, end = max(wanted.start - first, 0), min(wanted.stop - first, len(part))
        if start < end:
            found.append(part[start:end])
        first += len(part)
    return torch.cat(found) if found else parts[0][:0].clone()
