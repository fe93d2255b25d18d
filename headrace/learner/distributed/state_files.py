"""A learner's tensors as files: one for each rank, each with that rank's rows, read back by any number of ranks.

Of a tensor of D rows, rank r of N holds rows `r * ceil(D / N)` up to the next rank's, as FSDP2 shards them, so the
files one after another are the whole tensor. Scalars are the same in all files; random state is each rank's own.
Nothing but safetensors: no pickle, and any tool reads them.
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
RANDOM_STATE = "random."
"""What the names of random states begin with."""


def write_state(folder: Path, tensors: Mapping[str, Tensor], rank: int = 0, count: int = 1) -> dict[str, FileEntry]:
    """One rank's file, durable, of contiguous tensors; returns its name and what must be read. Raises `OSError` or
    `SafetensorError`."""
    path = folder / (STATE_FILE if count == 1 else f"state-{rank + 1:05d}-of-{count:05d}.safetensors")
    save_file(dict(tensors), path)
    fsync_path(path)
    return {path.name: file_entry(path)}


def read_state(folder: Path, files: Sequence[str], rank: int = 0, count: int = 1) -> dict[str, Tensor]:
    """One rank's tensors out of all `files` of a checkpoint; no random state for a rank that there was none of."""
    with contextlib.ExitStack() as stack:
        parts: list[Any] = [stack.enter_context(safe_open(folder / name, "pt")) for name in sorted(files)]
        names = [name for name in parts[0].keys() if not name.startswith(RANDOM_STATE)]  # noqa: SIM118 - no mapping
        tensors = {name: _rows([part.get_tensor(name) for part in parts], rank, count) for name in names}
        if rank < len(parts):
            own = [name for name in parts[rank].keys() if name.startswith(RANDOM_STATE)]  # noqa: SIM118
            tensors |= {name: parts[rank].get_tensor(name) for name in own}
    return tensors


def rows_of(num_rows: int, rank: int, count: int) -> range:
    """Which of a tensor's rows a rank holds; for the last ones there may be none."""
    each = -(-num_rows // count)
    return range(min(num_rows, rank * each), min(num_rows, (rank + 1) * each))


def _rows(parts: list[Tensor], rank: int, count: int) -> Tensor:
    """`parts` are views of mapped files: only what is taken is read."""
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
