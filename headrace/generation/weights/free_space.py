"""Checks that the weights fit into their folder before any byte is written.

A memory-backed folder has a fixed size. Writing to a memory-mapped file in a full one would kill the process by SIGBUS
without a message, so a file's space is allocated first.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np

from headrace.common.weights.delta import Bytes
from headrace.common.weights.files import ITEM_BYTES, WeightsError
from headrace.generation.tensors.shapes import expected_shapes

NUM_VERSIONS = 2
"""Number of versions in the folder at a time: the one that is served, and the next one."""
NEXT_STEP = (
    "make it larger (Compose: HEADRACE_SHM; docker run: --shm-size; Kubernetes: the sizeLimit of the volume at "
    "/dev/shm; elsewhere: mount -o remount,size=... /dev/shm)"
)


class InsufficientSpace(WeightsError):
    """The folder for the weights is too small."""


def check_capacity(folder: Path, model_folder: Path, dtype: str) -> None:
    """Raises `InsufficientSpace` unless `NUM_VERSIONS` versions of the model, stored in `dtype`, fit into `folder`.

    A model folder without safetensors files is not checked.
    """
    num_items = sum(math.prod(shape) for shape in expected_shapes(model_folder).values())
    needed, free = NUM_VERSIONS * num_items * ITEM_BYTES[dtype], shutil.disk_usage(folder).free
    if free < needed:
        raise InsufficientSpace(
            f"{folder} has {_gib(free)} free, {NUM_VERSIONS} versions of {model_folder} in {dtype} need "
            f"{_gib(needed)}: {NEXT_STEP}"
        )


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raises `InsufficientSpace` if `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InsufficientSpace(f"{folder} has {_gib(free)} free, {_gib(num_bytes)} are needed: {NEXT_STEP}")


def allocate(path: Path, num_bytes: int) -> Bytes:
    """Maps a new file of `num_bytes` for writing. Raises `InsufficientSpace`, leaving no file, if it does not fit."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            path.unlink()
            raise InsufficientSpace(
                f"{path}: {_gib(num_bytes)} cannot be allocated ({error.strerror}): {NEXT_STEP}"
            ) from error
    return np.memmap(path, np.uint8, "r+")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.3g} GiB"
