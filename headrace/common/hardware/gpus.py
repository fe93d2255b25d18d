"""The NVIDIA GPUs that this process may use, and their memory, by the driver's `nvidia-smi`. Imports no torch.

CUDA_VISIBLE_DEVICES is interpreted as CUDA does (CUDA C++ Programming Guide, "CUDA Environment Variables"): indices,
UUIDs or their prefixes, MIG devices; the first invalid name ends the list. A GPU keeps the name that it has there, so
that the name can be passed to child processes. Without `nvidia-smi`, GPUs are counted by their device files, and their
memory is unknown.
"""

import csv
import os
import subprocess
from typing import NamedTuple

from headrace.common.hardware.device import VISIBLE_DEVICES, gpu_files, has_gpu, hides_all_gpus

MIB = 1 << 20
QUERY = ["nvidia-smi", "--query-gpu=uuid,memory.total,memory.free", "--format=csv,noheader,nounits"]
QUERY_TIMEOUT_S = 60.0
"""Without persistence mode the driver takes seconds to initialise each GPU."""


class Gpu(NamedTuple):
    name: str
    """Its name in CUDA_VISIBLE_DEVICES."""
    total_bytes: int = 0
    free_bytes: int = 0
    """Both are 0 if memory is unknown."""


class _DetectedGpu(NamedTuple):
    uuid: str
    total_bytes: int
    free_bytes: int


def visible_gpus() -> list[Gpu]:
    """The GPUs in CUDA's order. Raises `ValueError` if one is named twice; CUDA would then show none."""
    given = os.environ.get(VISIBLE_DEVICES)
    if hides_all_gpus(given) or not has_gpu():
        return []
    present = _query_driver() or _count_device_files()
    if given is None:
        return [Gpu(str(index), gpu.total_bytes, gpu.free_bytes) for index, gpu in enumerate(present)]
    return select_gpus(given, present)


def select_gpus(given: str, present: list[_DetectedGpu]) -> list[Gpu]:
    """The GPUs of `present` (in the driver's order) that a value of CUDA_VISIBLE_DEVICES names."""
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
    """True for every name if the GPU's UUID is unknown."""
    return not gpu.uuid or gpu.uuid.startswith(name)


def _query_driver() -> list[_DetectedGpu]:
    """Asks `nvidia-smi`; empty if it does not answer."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [row for row in csv.reader(answer.splitlines(), skipinitialspace=True) if len(row) == 3]
    return [_DetectedGpu(uuid, _bytes(total), _bytes(free)) for uuid, total, free in rows]


def _bytes(mib: str) -> int:
    """0 for a GPU that shares the machine's memory; its value is `[N/A]`."""
    return int(mib) * MIB if mib.strip().isdecimal() else 0


def _count_device_files() -> list[_DetectedGpu]:
    """Counts device files; at least one GPU, since WSL2 has no such files."""
    return [_DetectedGpu("", 0, 0)] * max(1, len(gpu_files()))
