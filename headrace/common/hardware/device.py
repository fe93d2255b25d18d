"""Which machine this is, which device a process runs on and what it gets there; imports no torch."""

import importlib.util
import os
import runpy
from functools import cache
from pathlib import Path
from typing import Literal

CPU_MAX_TOTAL_TOKENS = 65536
"""Tokens in the KV cache of an engine on a CPU."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_FILES = Path("/dev")
WSL_LIBRARIES = Path("/usr/lib/wsl/lib")
"""Where WSL2 puts the driver's libraries; its GPUs have no device files of their own."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux calls them, on x86 and on ARM."""


def machine_id() -> str:
    """The same for all processes of a machine, its containers included, until it is booted again; empty if unknown."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """ "auto" is CUDA where nothing keeps this process from it (`why_not_cuda`), for a learner and an engine alike."""
    if device != "auto":
        return device
    return "cpu" if why_not_cuda() else "cuda"


def why_not_cuda() -> str:
    """What keeps `auto` on the CPU, for people; empty if nothing does.

    A GPU must be visible to this process, and installed what uses it: a CUDA build of torch, and the compiled kernels
    of SGLang wherever SGLang is. A machine for a learner alone has no SGLang, and needs none of its kernels.
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
    """Whether that value of CUDA_VISIBLE_DEVICES shows nothing: CUDA takes its names up to the first that is none."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def missing_for_cuda(is_engine: bool) -> str:
    """What is not installed here of what a process on CUDA needs, for people; empty if all of it is."""
    missing = [] if _is_cuda_torch() else ["a CUDA build of torch"]
    if is_engine and importlib.util.find_spec("sgl_kernel") is None:
        missing.append("SGLang's compiled kernels (sgl_kernel)")
    return f"not installed here: {' and '.join(missing)}" if missing else ""


def _is_cuda_torch() -> bool:
    found = importlib.util.find_spec("torch")
    return found is not None and found.origin is not None and _cuda_version(Path(found.origin)) is not None


@cache
def _cuda_version(torch: Path) -> str | None:
    """That torch's build was made for; read from its own file, without the seconds that importing torch takes."""
    version: str | None = runpy.run_path(str(torch.with_name("version.py"))).get("cuda")
    return version


def has_bfloat16_units() -> bool:
    """Whether this machine's CPU has units for it; without, torch's multiplications take several times as long as in
    float32. False if unknown."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not _BFLOAT16_UNITS.isdisjoint(flags)


def compute_dtype(dtype: Literal["float32", "bfloat16"], device: str) -> Literal["float32", "bfloat16"]:
    """What a learner on `device` multiplies weights of `dtype` in."""
    return "float32" if device == "cpu" and not has_bfloat16_units() else dtype
