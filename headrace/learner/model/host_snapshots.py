"""Copies of tensors in host memory, taken while the loop waits and read by threads while it goes on.

The memory of a copy is used again for a later one once nobody holds the copy any more, so that it is neither asked for
nor given back at every version. It is pinned where the tensors are on a GPU.
"""

import weakref
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.common.weights.delta import Bytes


class Weight(Protocol):
    """A tensor, or what stands for one until `detach` makes it whole."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> torch.Size: ...
    def detach(self) -> Tensor: ...


def bytes_of(tensor: Tensor) -> Bytes:
    """Of a contiguous one on the CPU, in the same memory."""
    content: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return content


class Snapshot:
    """Tensors by name, contiguous and on the CPU; their memory is the snapshot's for as long as somebody holds it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors


class Snapshots:
    """Of the same tensors, again and again. `take` is for one thread; a snapshot may be let go of by any."""

    def __init__(self) -> None:
        self._free: list[dict[str, Tensor]] = []

    def take(self, tensors: Mapping[str, Weight]) -> Snapshot:
        """Returns when all of them are copied. A weight that lies on several ranks is gathered, one after the other."""
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
    """On the CPU by `memcpy`, which writes past the caches: torch's own copy takes half as long again."""
    if tensor.is_cuda or not tensor.is_contiguous():
        memory.copy_(tensor, non_blocking=True)
    else:
        np.copyto(bytes_of(memory), bytes_of(tensor))
