"""Which device an engine runs on, and what it gets there when nothing is configured; imports no torch."""

from pathlib import Path
from typing import Literal

CPU_MAX_TOTAL_TOKENS = 65536
"""Tokens in the KV cache of an engine on a CPU."""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """ "auto" is CUDA where an NVIDIA device is visible to this machine or container."""
    if device != "auto":
        return device
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"
