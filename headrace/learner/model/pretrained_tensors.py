"""The tensors of a model's pretrained checkpoint, read from the safetensors files that `from_pretrained` reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class PretrainedTensor:
    """A tensor of a pretrained checkpoint; each `detach` reads it from its file."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: Path

    def detach(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            found: Tensor = opened.get_tensor(self.name)
        return found


def pretrained_tensors(path: str, revision: str | None = None) -> Iterator[PretrainedTensor]:
    """All tensors of the checkpoint; none if it has no safetensors files. Raises `ValueError` on a dtype that weight
    versions do not support."""
    for file in _checkpoint_files(path, revision):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    expected = ", ".join(_DTYPES)
                    raise ValueError(f"model {path!r}: {name} is {part.get_dtype()}; expected one of {expected}")
                yield PretrainedTensor(name, torch.Size(part.get_shape()), _DTYPES[part.get_dtype()], Path(file))


def _checkpoint_files(path: str, revision: str | None) -> list[str]:
    def find(name: str) -> str | None:
        found: str | None = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found

    if single := find(SAFE_WEIGHTS_NAME):
        return [single]
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        return list(get_checkpoint_shard_files(path, index, revision=revision)[0])
    return []
