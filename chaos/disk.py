"""The disk for checkpoints: a small tmpfs that can be filled, with files that can be truncated.

Where mounting is not permitted the folder stays an ordinary one, `is_mounted` is false, and the disk cannot be filled.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

from headrace.common.process.atomic_files import file_entry
from headrace.learner.checkpoints.record import UnreadableCheckpoint, checkpoint_folders, read_record

SIZE_BYTES = 64 << 20
"""About eight times a checkpoint of the demo policy."""
FILLER = "filler"
LARGEST_PIECE_BYTES = 1 << 20
SMALLEST_PIECE_BYTES = 512


class SmallDisk:
    """Mounted on `folder` until `close`, which leaves the files behind in the folder itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},mode=700", "headrace-chaos", str(folder)]
        self.problem = _problem_of(command)
        """The reason why it is not mounted; empty if it is."""

    @property
    def is_mounted(self) -> bool:
        return not self.problem

    def fill(self) -> None:
        """Fills it to the last byte, including what was freed since the last call."""
        with (self.folder / FILLER).open("ab", buffering=0) as filler:
            size = LARGEST_PIECE_BYTES
            while size >= SMALLEST_PIECE_BYTES:
                try:
                    filler.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def free(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        if not self.is_mounted:
            return
        self.free()
        beside = self.folder.with_name(f"{self.folder.name}-kept")
        shutil.copytree(self.folder, beside)
        unmount(self.folder)
        self.folder.rmdir()
        beside.rename(self.folder)
        self.problem = "closed"


def unmount(folder: Path) -> None:
    """Unmounts the folder if it is mounted, perhaps by an earlier harness that was killed."""
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def readable_checkpoints(root: Path) -> list[Path]:
    """From the oldest to the newest."""
    return [folder for folder in checkpoint_folders(root) if is_readable(folder)]


def is_readable(folder: Path) -> bool:
    """False for a checkpoint that is being deleted, too."""
    try:
        record = read_record(folder)
        return all(file_entry(folder / name) == expected for name, expected in record.files.items())
    except (OSError, UnreadableCheckpoint):
        return False


def truncate(checkpoint: Path, choice: int, place: float) -> str:
    """Truncates one of the checkpoint's files at `place` in [0, 1) of its length; returns a description."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    path = files[choice % len(files)]
    length = path.stat().st_size
    kept = int(length * place)
    os.truncate(path, kept)
    return f"{checkpoint.name}/{path.name} cut to {kept} of {length} bytes"


def _problem_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"mount ended with {done.returncode}" if done.returncode else ""
