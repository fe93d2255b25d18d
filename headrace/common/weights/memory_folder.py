"""A process's temporary folder on a memory-backed file system, for weights on their way to an engine.

The folder is removed when the process ends. If the process was killed, the next process that makes such a folder
removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from headrace.common.weights.files import WeightsError

LOCK_FILE = "lock"


class MemoryFolder:
    """A new folder `root` in `parent` whose name begins with `prefix`; removes the folders of killed processes."""

    def __init__(self, prefix: str, parent: Path) -> None:
        _remove_orphans(parent, prefix)
        self.root = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._end = weakref.finalize(self, _remove, self.root, _lock(self.root))  # also when the interpreter ends

    def close(self) -> None:
        self._end()


def memory_backed_folder() -> Path:
    """/dev/shm if it is writable, else the ordinary temporary folder."""
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
            return folder
    raise WeightsError(f"no folder for the weights: neither /dev/shm nor {tempfile.gettempdir()} can be written")


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: Path) -> int:
    """Locks the folder until the descriptor is closed or the process ends. Raises `OSError` if it is locked."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_orphans(parent: Path, prefix: str) -> None:
    """Removes the folders of processes that were killed."""
    for lock in parent.glob(f"{prefix}*/{LOCK_FILE}"):
        with contextlib.suppress(OSError):
            descriptor = _lock(lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
            os.close(descriptor)
