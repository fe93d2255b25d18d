"""Compares the checksum of a tensor on CUDA with that of SGLang's kernel, run by Triton's interpreter without a GPU."""

import json
import os
import subprocess
import sys

import numpy as np

from headrace.generation.tensors.checksum import TILE_WORDS, cuda_checksum
from tests.support.guard import GUARD_S

KERNEL = """
import importlib.util, json, pathlib, sys
import numpy as np, torch
torch.Tensor.is_cuda = property(lambda _: True)  # all that the function around the kernel asks of the device
[sglang] = importlib.util.find_spec("sglang").submodule_search_locations
path = pathlib.Path(sglang) / "kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for size in json.loads(sys.argv[1]):
    tensor = torch.tensor(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    print(f"{module.gpu_tensor_hash(tensor):016x}")
"""
SIZES = [2, 3, 1022, 4 * TILE_WORDS, 9 * 4 * TILE_WORDS + 6]
"""Bytes: less than a word, not whole words, a whole tile, more tiles than are computed at a time."""


def test_it_is_what_sglangs_kernel_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KERNEL, json.dumps(SIZES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    payloads = [np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes() for size in SIZES]
    assert [cuda_checksum(payload) for payload in payloads] == done.stdout.split()


def test_it_depends_on_every_bit_and_on_its_place() -> None:
    payload = np.random.default_rng(0).integers(0, 256, 4 * TILE_WORDS + 40, np.uint8)
    flipped = payload.copy()
    flipped[-1] ^= 1
    swapped = payload.copy()
    swapped[:4], swapped[4:8] = payload[4:8], payload[:4]
    assert len({cuda_checksum(one.tobytes()) for one in (payload, flipped, swapped)}) == 3
