"""Checkpoints: what a learner needs to go on as if it had never stopped, durable before anyone relies on it.

A checkpoint is a folder of safetensors (float32 masters, moments) and a JSON record, written aside, fsynced and
renamed. Two are kept: checkpoint N deletes from Redis what N-1 recorded, so that a corrupt newest one loses
nothing.
"""

import logging
import shutil
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.weights import move_into_place
from services.learner.store import Cursor, Settlement

NUM_KEPT = 2
_TENSORS_FILE = "state.safetensors"
_RECORD_FILE = "record.json"
_log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """Everything of a checkpoint but the tensors."""

    step: int
    version: int
    cursor: Cursor
    version_steps: dict[int, int]
    settlements: list[Settlement]
    """What became of the groups consumed since the checkpoint before."""
    counts: dict[str, int]
    wall_s: float
    """From the first ticket to this checkpoint, over all lives of the run."""
    schema: int = 1


def save_checkpoint(root: Path, record: Record, tensors: dict[str, Tensor]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    aside = root / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / _TENSORS_FILE)
    (aside / _RECORD_FILE).write_bytes(msgspec.json.encode(record))
    final = root / f"step-{record.step:08d}"
    move_into_place(aside, final)
    for folder in _folders(root)[:-NUM_KEPT]:
        shutil.rmtree(folder)
    return final


def load_newest(root: Path) -> tuple[Record, dict[str, Tensor]] | None:
    """The newest checkpoint that can be read; an unreadable one is reported and passed over."""
    for folder in reversed(_folders(root)):
        try:
            record = msgspec.json.decode((folder / _RECORD_FILE).read_bytes(), type=Record)
            return record, load_file(folder / _TENSORS_FILE)
        except (OSError, msgspec.DecodeError, SafetensorError) as error:
            _log.error("checkpoint %s is unreadable, taking the one before: %s", folder.name, error)
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))
