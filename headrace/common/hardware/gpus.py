"""The NVIDIA GPUs that this process may use, and their memory, as the driver's `nvidia-smi` tells; imports no torch.

CUDA_VISIBLE_DEVICES is respected as CUDA does (CUDA C++ Programming Guide, "CUDA Environment Variables"): indices,
UUIDs or their beginnings, MIG devices; the first name that is none ends the list. What it names keeps its name, so
that it can be handed on. Without `nvidia-smi` GPUs are counted by their device files, and their memory is unknown.
"""

import csv
import os
import subprocess
from typing import NamedTuple

from headrace.common.hardware.device import VISIBLE_DEVICES, gpu_files, has_gpu, hides_all_gpus

MIB = 1 << 20
QUERY = ["nvidia-smi", "--query-gpu=uuid,memory.total,memory.free", "--format=csv,noheader,nounits"]
QUERY_TIMEOUT_S = 60.0
"""A driver that keeps no state between its users takes seconds to wake each GPU."""


class Gpu(NamedTuple):
    name: str
    """As CUDA_VISIBLE_DEVICES calls it."""
    total_bytes: int = 0
    free_bytes: int = 0
    """0 where memory is unknown."""


class _DetectedGpu(NamedTuple):
    uuid: str
    total_bytes: int
    free_bytes: int


def visible_gpus() -> list[Gpu]:
    """In the order in which CUDA shows them. Raises `ValueError` if one is named twice, where CUDA shows none."""
    given = os.environ.get(VISIBLE_DEVICES)
    if hides_all_gpus(given) or not has_gpu():
        return []
    present = _query_driver() or _count_device_files()
    if given is None:
        return [Gpu(str(index), gpu.total_bytes, gpu.free_bytes) for index, gpu in enumerate(present)]
    return select_gpus(given, present)


def select_gpus(given: str, present: list[_DetectedGpu]) -> list[Gpu]:
    """Those of `present`, in the driver's order, that a value of CUDA_VISIBLE_DEVICES names."""
    found: list[Gpu] = []
    for name in (part.strip() for part in given.split(",")):
        if name.startswith("MIG-"):  # a part of a GPU, which the query does not list
            gpu = _DetectedGpu(name, 0, 0)
        elif name.isdecimal() and int(name) < len(present):
            gpu = present[int(name)]
        elif name.startswith("GPU-") and (matching := [one for one in present if _matches_uuid(one, name)]):
            gpu = matching[0]
        else:
            break
        if name in [one.name for one in found]:
            raise ValueError(f"{VISIBLE_DEVICES} is {given!r}: it names {name} twice, with which CUDA shows no GPU")
        found.append(Gpu(name, gpu.total_bytes, gpu.free_bytes))
    return found


def _matches_uuid(gpu: _DetectedGpu, name: str) -> bool:
    """Without the driver's word any UUID may be right."""
    return not gpu.uuid or gpu.uuid.startswith(name)


def _query_driver() -> list[_DetectedGpu]:
    """Empty if it cannot be asked."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [row for row in csv.reader(answer.splitlines(), skipinitialspace=True) if len(row) == 3]
    return [_DetectedGpu(uuid, _bytes(total), _bytes(free)) for uuid, total, free in rows]


def _bytes(mib: str) -> int:
    """0 for a GPU that shares the machine's memory, whose figure is `[N/A]`."""
    return int(mib) * MIB if mib.strip().isdecimal() else 0


def _count_device_files() -> list[_DetectedGpu]:
    """At least one: under WSL2 there are no such files."""
    return [_DetectedGpu("", 0, 0)] * max(1, len(gpu_files()))
