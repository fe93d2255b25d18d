"""The launcher's files in a run's folder: the lock, the URLs of Redis and control, the configuration.

Only one process at a time holds a run. The lock is the kernel's (flock), so it is released however its holder dies,
but only after the Redis server that the holder started has ended as well: two servers would corrupt one append-only
file.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.common.config import Recipe

LOCK_FILE = "lock"
REDIS_URL_FILE = "redis-url"
CONTROL_URL_FILE = "control-url"
ORPHAN_TIMEOUT_S = 10.0
POLL_S = 0.05


class RunInUse(ValueError):
    """Another process holds the run."""


@contextmanager
def run_lock(folder: Path) -> Iterator[int]:
    """Holds the run and yields the lock's file descriptor. Raises `RunInUse` naming the holder's process id."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Waits a while if the holder is dead and only its server is still running."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace")
            if not _has_ended(holder) or time.monotonic() > deadline:
                raise RunInUse(f"run {folder.name!r} in {folder} is in use by process {holder or '?'}") from error
        time.sleep(POLL_S)


def _has_ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        pass
    return False


@contextmanager
def write_url_file(folder: Path, url: str, file: str = REDIS_URL_FILE) -> Iterator[None]:
    """Keeps the URL of the run's Redis, or control, in its folder while the block runs; only the owner can read it."""
    path = folder / file
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as note:
        note.write(url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_url_file(folder: Path, file: str = REDIS_URL_FILE) -> str | None:
    """The URL of the run's Redis, or control, while the run is live. A killed launcher leaves the file behind."""
    with suppress(FileNotFoundError):
        return (folder / file).read_text() or None
    return None


def runs_with_control(runs_folder: Path) -> dict[str, str]:
    """URLs of the control services of the folder's runs, by the run's name."""
    notes = sorted(runs_folder.glob(f"*/{CONTROL_URL_FILE}"))
    found = {note.parent.name: read_url_file(note.parent, CONTROL_URL_FILE) for note in notes}
    return {name: url for name, url in found.items() if url}


def newest_run(runs_folder: Path) -> str:
    """The run that was started last. Raises `ValueError` if none was."""
    found = sorted(runs_folder.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"there is no run in {runs_folder}")
    return found[-1].parent.name


def write_config(folder: Path, recipe: "Recipe") -> Path:
    """The resolved configuration, without the Redis URL, which may hold a password."""
    from headrace.common.config import yaml_text

    path = folder / "config.yaml"
    settings = recipe.config.model_dump(mode="json", exclude={"redis_url"})
    path.write_text(yaml_text.dump(settings))
    return path
