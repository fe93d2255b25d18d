"""The cost of weight versions in bytes and on one core, by encoding.

    python -m benchmarks.weights.encodings [--millions 50]

Sizes (as a share of the whole model) and speeds (GB/s of the model's bytes) of four exact encodings: full (no
encoding), raw sparse (a 32-bit index and a value for each change), xor + zstd, and ours
(headrace/common/weights/delta.py). They are measured on random bfloat16 weights of which none, 1.5 % or all differ by
one unit in the last place, and on real consecutive versions, from a run of the demo with the real engine, in bfloat16
with float32 masters, at lr 1e-6, which this command makes first.

Speeds are the best of several repetitions, in memory, on one thread. BLAKE3 of the result, which every version needs
with any encoding, has a row of its own. Rows go to benchmarks/results/weights.json.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from blake3 import blake3
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.demo import RECIPE, ROOT, headrace_up
from headrace.common.weights.delta import Bits, apply_patch, make_patch
from headrace.common.weights.files import MODEL_FILE
from headrace.common.weights.memory_folder import MemoryFolder, memory_backed_folder
from headrace.learner.weights.publisher import MEMORY_FOLDER_PREFIX

RESULTS = ROOT / "benchmarks" / "results" / "weights.json"
REPEATS = 5
LOOK_S = 0.02
"""Interval of polling for versions, of which two are in memory at a time."""
RUN_SETTINGS = ["model.dtype=bfloat16", "optimizer.lr=1e-6", "learner.steps=12", "evaluation.num_prompts=16"]
Row = dict[str, Any]
Pair = tuple[Bits, Bits]
"""A tensor, and the same tensor one version before."""
Encode = Callable[[Bits, Bits], Any]
Decode = Callable[[Any, Bits, Bits], None]
"""Arguments: the encoded bytes, the tensor before, and where to write."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights.encodings")
    parser.add_argument("--millions", type=float, default=50, help="millions of random weights")
    num_items = int(parser.parse_args().millions * 1e6)
    rows = []
    for case, share in (("none changes", 0.0), ("1.5 % by one unit", 0.015), ("all by one unit", 1.0)):
        rows += measure(case, [random_pair(num_items, share)])
    with tempfile.TemporaryDirectory(prefix="headrace-weights-") as folder:
        versions = real_versions(Path(folder))
    for index in (1, len(versions) - 1):
        pairs = list(zip(versions[index], versions[index - 1], strict=True))
        rows += measure(f"real: version {index + 1} after {index}, lr 1e-6", pairs)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    report(rows, Console(highlight=False, width=110))


def random_pair(num_items: int, share: float) -> Pair:
    """Normal weights of deviation 0.02, and a copy with a random `share` moved a unit up or down."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(num_items, np.float32) * np.float32(0.02)
    before: Bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
    places = np.flatnonzero(rng.random(num_items, np.float32) < share)
    after = before.copy()
    after[places] += np.where(rng.random(len(places)) < 0.5, 1, 0xFFFF).astype(np.uint16)
    return after, before


def real_versions(folder: Path) -> list[list[Bits]]:
    """Tensors of consecutive versions of a short run; the files are hard-linked before the learner deletes them."""
    settings = [part for setting in RUN_SETTINGS for part in ("--set", setting)]
    command = headrace_up(RECIPE, "real", "--runs-folder", str(folder), *settings)
    files = f"{MEMORY_FOLDER_PREFIX}*/v*/{MODEL_FILE}"
    others, kept = set(memory_backed_folder().glob(files)), MemoryFolder("headrace-benchmark-", memory_backed_folder())
    with contextlib.closing(kept), subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            time.sleep(LOOK_S)
            for path in memory_backed_folder().glob(files):
                place = kept.root / path.parent.name
                if path not in others and not place.exists():
                    with contextlib.suppress(FileNotFoundError):  # deleted just now
                        place.hardlink_to(path)
        if run.returncode:
            raise RuntimeError(f"the run ended with {run.returncode}")
        found = {int(path.name[1:]): load_file(path) for path in kept.root.glob("v*")}
    versions = sorted(found)
    if versions != list(range(versions[0], versions[-1] + 1)):
        raise RuntimeError(f"expected consecutive versions, found {versions}")
    return [[_bits(tensor) for tensor in found[version].values()] for version in versions]


def _bits(tensor: torch.Tensor) -> Bits:
    bits: Bits = tensor.flatten().view(torch.uint8).numpy().view(np.uint16)
    return bits


def measure(case: str, pairs: Sequence[Pair]) -> list[Row]:
    model_bytes = sum(after.nbytes for after, _ in pairs)
    num_changed = sum(int(np.count_nonzero(after != before)) for after, before in pairs)
    changed = num_changed / sum(len(after) for after, _ in pairs)
    rows = []
    for name, (encode_one, decode_one) in METHODS.items():
        encode_s, sent = _best(partial(_encode_all, encode_one, pairs))
        outs = [before.copy() for _, before in pairs]
        decode_s, _ = _best(partial(_decode_all, decode_one, sent, pairs, outs))
        assert all(np.array_equal(out, after) for (after, _), out in zip(pairs, outs, strict=True)), "exact"
        num_bytes = sum(_size(one) for one in sent)
        speeds = {"encode_gb_per_s": model_bytes / encode_s / 1e9, "decode_gb_per_s": model_bytes / decode_s / 1e9}
        row = {"case": case, "method": name, "bytes": num_bytes, "share": num_bytes / model_bytes, "changed": changed}
        rows.append(row | {"model_bytes": model_bytes} | speeds)
    digest_s, _ = _best(lambda: [blake3(after.view(np.uint8).data).digest() for after, _ in pairs])
    speeds = {"encode_gb_per_s": model_bytes / digest_s / 1e9, "decode_gb_per_s": model_bytes / digest_s / 1e9}
    return [*rows, {"case": case, "method": "BLAKE3 of the result", "model_bytes": model_bytes, **speeds}]


def _encode_all(encode_one: Encode, pairs: Sequence[Pair]) -> list[Any]:
    return [encode_one(*pair) for pair in pairs]


def _decode_all(decode_one: Decode, sent: Sequence[Any], pairs: Sequence[Pair], outs: Sequence[Bits]) -> None:
    for one, (_, before), out in zip(sent, pairs, outs, strict=True):
        decode_one(one, before, out)


def _best(act: Callable[[], Any]) -> tuple[float, Any]:
    best_s = float("inf")
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        result = act()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s, result


def _size(sent: Any) -> int:
    if isinstance(sent, bytes | np.ndarray):
        return len(sent) if isinstance(sent, bytes) else sent.nbytes
    return sum(_size(part) for part in sent if not hasattr(part, "method"))


def _full(after: Bits, before: Bits) -> Any:
    return after


def _copy(sent: Bits, before: Bits, out: Bits) -> None:
    np.copyto(out, sent)


def _raw_sparse(after: Bits, before: Bits) -> Any:
    places = np.flatnonzero(after != before).astype(np.uint32)
    return places, after[places]


def _put(sent: Any, before: Bits, out: Bits) -> None:
    np.copyto(out, before)
    out[sent[0]] = sent[1]


def _xor(after: Bits, before: Bits) -> Any:
    return zstandard.ZstdCompressor(level=1).compress((after ^ before).data)


def _unxor(sent: bytes, before: Bits, out: Bits) -> None:
    difference = np.frombuffer(zstandard.ZstdDecompressor().decompress(sent), before.dtype)
    np.bitwise_xor(before, difference, out=out)


def _ours(after: Bits, before: Bits) -> Any:
    patch, frames = make_patch(after, before)
    return patch, b"".join(frames)


def _apply_ours(sent: Any, before: Bits, out: Bits) -> None:
    apply_patch(sent[0], memoryview(sent[1]), before, out)


METHODS: dict[str, tuple[Encode, Decode]] = {
    "full": (_full, _copy),
    "raw sparse": (_raw_sparse, _put),
    "xor + zstd": (_xor, _unxor),
    "ours": (_ours, _apply_ours),
}


def report(rows: Sequence[Row], console: Console) -> None:
    table = Table("case", "changed", "method", "bytes", "share", "encode GB/s", "decode GB/s")
    for row in rows:
        is_code = "bytes" in row
        table.add_row(
            row["case"],
            f"{row['changed']:.2%}" if is_code else "",
            row["method"],
            f"{row['bytes']:,}" if is_code else "",
            f"{row['share']:.3%}" if is_code else "",
            *(f"{row[key]:.2f}" if row["method"] != "full" or key[0] == "d" else "" for key in SPEEDS),
        )
    console.print(table)


SPEEDS = ("encode_gb_per_s", "decode_gb_per_s")


if __name__ == "__main__":
    main()
