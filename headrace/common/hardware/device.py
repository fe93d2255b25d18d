"""The machine's identity, and the device that a process runs on. Imports no torch."""

import importlib.util
import os
import runpy
from functools import cache
from pathlib import Path
from typing import Literal

CPU_MAX_TOTAL_TOKENS = 65536
"""Size in tokens of the KV cache of an engine on a CPU."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_FILES = Path("/dev")
WSL_LIBRARIES = Path("/usr/lib/wsl/lib")
"""Folder where WSL2 puts the driver's libraries; GPUs have no device files there."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags, by Linux's names on x86 and on ARM."""


def machine_id() -> str:
    """An id that all processes of a machine share, containers included, until its next boot; empty if unknown."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device itself; for "auto", CUDA unless `why_not_cuda` gives a reason against it."""
    if device != "auto":
        return device
    return "cpu" if why_not_cuda() else "cuda"


def why_not_cuda() -> str:
    """The reason why `auto` selects the CPU, as a message; empty if it selects CUDA.

    A GPU must be visible to this process, and a CUDA build of torch installed. If SGLang is installed, its compiled
    kernels must be, too; a machine for a learner alone needs neither.
    """
    if not is_gpu_visible():
        return "no NVIDIA GPU is visible to this process"
    return missing_for_cuda(is_engine=importlib.util.find_spec("sglang") is not None)


def is_gpu_visible() -> bool:
    """Whether this machine or container has an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide."""
    return has_gpu() and not hides_all_gpus(os.environ.get(VISIBLE_DEVICES))


def has_gpu() -> bool:
    return bool(gpu_files()) or ((DEVICE_FILES / "dxg").exists() and any(WSL_LIBRARIES.glob("libcuda.so*")))


def gpu_files() -> list[Path]:
    return sorted(DEVICE_FILES.glob("nvidia[0-9]*"))


def hides_all_gpus(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES hides all GPUs: CUDA reads its names up to the first invalid one."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def missing_for_cuda(is_engine: bool) -> str:
    """The packages that a process on CUDA needs and that are missing here, as a message; empty if none is."""
    missing = [] if _is_cuda_torch() else ["a CUDA build of torch"]
    if is_engine and importlib.util.find_spec("sgl_kernel") is None:
        missing.append("SGLang's compiled kernels (sgl_kernel)")
    return f"not installed here: {' and '.join(missing)}" if missing else ""


def _is_cuda_torch() -> bool:
    found = importlib.util.find_spec("torch")
    return found is not None and found.origin is not None and _cuda_version(Path(found.origin)) is not None


@cache
def _cuda_version(torch: Path) -> str | None:
    """The CUDA version of a torch build, read from its version.py, because importing torch takes seconds."""
    version: str | None = runpy.run_path(str(torch.with_name("version.py"))).get("cuda")
    return version


def has_bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware; false if unknown.

    Without such units torch's bfloat16 multiplications take several times as long as float32's.
    """
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not _BFLOAT16_UNITS.isdisjoint(flags)


def compute_dtype(dtype: Literal["float32", "bfloat16"], device: str) -> Literal["float32", "bfloat16"]:
    """The dtype of the multiplications of a learner on `device` whose weights have `dtype`."""
    return "float32" if device == "cpu" and not has_bfloat16_units() else dtype
