"""Weight versions as files: the manifest, and the layout of a model's file.

A version is a folder with `manifest.json` and `model.safetensors` (an anchor: the whole model), `delta.bin` (the change
from its base) or both. The manifest has the BLAKE3 digest of every resulting tensor, so a receiver can verify a tensor
however it arrived. It also has the SHA-256 of its base's manifest, so the digest of the newest manifest vouches for the
whole chain. The manifest's tensors alone determine the layout of a model's file, so its bytes are the same everywhere.
Imports no torch.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from blake3 import blake3

from headrace.common.weights.delta import Patch
from headrace.common.wire.structs import NonNegative

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.safetensors"
DELTA_FILE = "delta.bin"
FILES = (MANIFEST_FILE, MODEL_FILE, DELTA_FILE)
MAX_MANIFEST_BYTES = 1 << 26
MAX_MODEL_BYTES = 1 << 43
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1}
_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "uint8": "U8",
}  # fmt: skip

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class WeightsError(RuntimeError):
    """A version's bytes do not match its manifest, or the manifest is invalid."""


class TensorEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: Annotated[list[NonNegative], msgspec.Meta(max_length=32)]
    blake3: Digest
    """Digest of the tensor's bytes, row-major and little-endian."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Delta(msgspec.Struct, frozen=True):
    """The change from the version `base` to this one: a patch for every tensor.

    `DELTA_FILE` has the patches' frames in the order of the manifest's tensors.
    """

    base: NonNegative
    base_sha256: Digest
    """SHA-256 of the base's manifest."""
    num_bytes: NonNegative
    blake3: Digest
    """Digest of `DELTA_FILE`."""
    patches: dict[str, Patch]

    def slices(self) -> dict[str, slice]:
        """The position of each patch's frames in `DELTA_FILE`, by tensor."""
        ends = itertools.accumulate(patch.num_bytes for patch in self.patches.values())
        sizes = {name: patch.num_bytes for name, patch in self.patches.items()}
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


class FileLayout(NamedTuple):
    """The layout of a model's file: its header, the position of each tensor's bytes, its size."""

    header: bytes
    slices: dict[str, slice]
    num_bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """The content of a version. `step` is the step that made it; `lineage` names the learner's fencing epoch."""

    version: NonNegative
    step: NonNegative
    lineage: str
    tensors: dict[str, TensorEntry]
    """In their order in the model's file."""
    has_model: bool
    """Whether it is an anchor."""
    delta: Delta | None = None
    schema: int = 2

    @property
    def num_model_bytes(self) -> int:
        """Size of the whole model's file."""
        return model_layout(self.tensors).num_bytes


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def sha256_hex(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def decode_manifest(payload: bytes, sha256: str) -> Manifest:
    """Raises `WeightsError` unless the bytes have that SHA-256 and are a valid manifest."""
    found = sha256_hex(payload)
    if found != sha256:
        raise WeightsError(f"manifest has SHA-256 {found[:12]}…, expected {sha256[:12]}…")
    try:
        manifest = msgspec.json.decode(payload, type=Manifest)
    except msgspec.MsgspecError as error:
        raise WeightsError(f"manifest cannot be read: {error}") from error
    if problem := _problem(manifest):
        raise WeightsError(f"manifest of version {manifest.version}: {problem}")
    return manifest


def _problem(manifest: Manifest) -> str:
    for name, entry in manifest.tensors.items():
        if entry.dtype not in ITEM_BYTES:
            return f"tensor {name!r} is of dtype {entry.dtype!r}, expected one of {', '.join(ITEM_BYTES)}"
        if entry.num_bytes > MAX_MODEL_BYTES:
            return f"tensor {name!r} has shape {entry.shape}, expected at most {MAX_MODEL_BYTES} bytes"
    delta = manifest.delta
    if delta is None:
        return "" if manifest.has_model else "expected an anchor or a delta"
    if delta.base >= manifest.version:
        return f"a delta against version {delta.base}, expected an earlier one"
    if list(delta.patches) != list(manifest.tensors):
        return "expected a patch for every tensor, in their order"
    if any(length < 0 for patch in delta.patches.values() for length in patch.frame_bytes):
        return "a frame of negative length"
    num_bytes = sum(patch.num_bytes for patch in delta.patches.values())
    return "" if num_bytes == delta.num_bytes else f"patches of {num_bytes} bytes in {delta.num_bytes}"


def file_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names in their order in a model's file: the widest dtype first, so that every tensor is aligned."""
    return sorted(dtypes, key=lambda name: (-ITEM_BYTES[dtypes[name]], name))


def model_layout(tensors: Mapping[str, TensorEntry]) -> FileLayout:
    """The layout of a safetensors file with the tensors in this order, without gaps."""
    ends = list(itertools.accumulate((entry.num_bytes for entry in tensors.values()), initial=0))
    spans = dict(zip(tensors, itertools.pairwise(ends), strict=True))
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, entry in tensors.items():
        dtype = _SAFETENSORS_DTYPES[entry.dtype]
        described[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": spans[name]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slices = {name: slice(len(header) + begin, len(header) + end) for name, (begin, end) in spans.items()}
    return FileLayout(header, slices, len(header) + ends[-1])


def check_tensor(name: str, entry: TensorEntry, content: memoryview) -> None:
    """Raises `WeightsError` unless the bytes have the tensor's digest."""
    found = blake3(content).hexdigest()
    if found != entry.blake3:
        raise WeightsError(f"tensor {name}: BLAKE3 {found[:12]}…, expected {entry.blake3[:12]}…")


def version_folder(root: Path, version: int) -> Path:
    return root / f"v{version:08d}"


def version_file(root: Path, version: int, name: str) -> Path | None:
    """The version's file of that name; None if there is none. Serves only names in `FILES`, no symbolic link."""
    path = version_folder(root, version) / name
    return path if name in FILES and path.is_file() and not path.is_symlink() else None


def is_anchor(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file()


def stored_versions(root: Path) -> Iterator[int]:
    """The complete versions under `root`, in no particular order."""
    for folder in root.glob("v*"):
        if folder.name[1:].isdigit() and (folder / MANIFEST_FILE).is_file():
            yield int(folder.name[1:])
