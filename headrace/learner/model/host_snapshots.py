"""Copies of tensors in host memory, taken while the loop waits and read by other threads while it goes on.

The memory of a copy is reused for a later one once the copy is no longer referenced, so that memory is not allocated
and freed for every version. It is pinned if the tensors are on a GPU.
"""

import weakref
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.common.weights.delta import Bytes


class Weight(Protocol):
    """A tensor, or an object that produces it when `detach` is called."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> torch.Size: ...
    def detach(self) -> Tensor: ...


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous CPU tensor, in the same memory."""
    content: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return content


class Snapshot:
    """Contiguous CPU tensors by name; their memory is not reused as long as the snapshot is referenced."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors


class SnapshotPool:
    """Takes snapshots of the same tensors repeatedly. `take` is for one thread; any thread may release a snapshot."""

    def __init__(self) -> None:
        self._free: list[dict[str, Tensor]] = []

    def take(self, tensors: Mapping[str, Weight]) -> Snapshot:
        """Returns when all tensors are copied. Weights that are sharded are gathered one after another."""
        memory = self._free.pop() if self._free else {}
        is_on_gpu = False
        for name, weight in tensors.items():
            tensor = weight.detach()
            is_on_gpu = is_on_gpu or tensor.is_cuda
            if name not in memory or (memory[name].shape, memory[name].dtype) != (tensor.shape, tensor.dtype):
                memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            _copy(tensor, memory[name])
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()
        snapshot = Snapshot({name: memory[name] for name in tensors})
        weakref.finalize(snapshot, self._free.append, memory).atexit = False
        return snapshot


def _copy(tensor: Tensor, memory: Tensor) -> None:
    """Copies CPU tensors with `memcpy`, which bypasses the caches: torch's own copy takes 1.5 times as long."""
    if tensor.is_cuda or not tensor.is_contiguous():
        memory.copy_(tensor, non_blocking=True)
    else:
        np.copyto(bytes_of(memory), bytes_of(tensor))
