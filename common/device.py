"""Which machine this is, which device an engine runs on and what it gets there; imports no torch."""

from pathlib import Path
from typing import Literal

CPU_MAX_TOTAL_TOKENS = 65536
"""Tokens in the KV cache of an engine on a CPU."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """The same for all processes of a machine, its containers included, until it is booted again; empty if unknown."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """ "auto" is CUDA where an NVIDIA device is visible to this machine or container."""
    if device != "auto":
        return device
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"
