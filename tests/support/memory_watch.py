"""What a run's processes take of memory while it goes on: the most of each kind, by the rows of `headrace check`."""

import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil

KINDS = {
    "sglang::scheduler": "its engine: the scheduler",
    "sglang::detokenizer": "its engine: server and detokenizer",
    "headrace.generation.engine.cpu.launch_server": "its engine: server and detokenizer",
    "headrace.generation.rewards.worker": "its reward workers",
    "headrace.generation.environments.worker": "its environment workers",
    "headrace.generation": "a replica's own process",
    "headrace.learner": "the learner, with copies of weights and state",
    "headrace.control": "launcher, control and Redis, without the groups that wait",
    "valkey-server": "launcher, control and Redis, without the groups that wait",
    "headrace.launcher": "launcher, control and Redis, without the groups that wait",
}
"""What a command line holds, the first that fits -> the row."""
INTERVAL_S = 0.25


class MemoryWatch:
    """Looks at a process and its children until it is closed; those that follow each other count once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most: dict[tuple[str, str], int] = defaultdict(int)
        """Row and kind -> bytes."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def rows(self) -> dict[str, int]:
        """Bytes at most, of what is not in /dev/shm."""
        self._closed.set()
        self._thread.join()
        rows: dict[str, int] = defaultdict(int)
        for (row, _), num_bytes in self._most.items():
            rows[row] += num_bytes
        return rows

    def _look(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            with suppress(psutil.NoSuchProcess):
                launcher = psutil.Process(self._pid)
                for process in (launcher, *launcher.children(recursive=True)):
                    self._look_at(process)

    def _look_at(self, process: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            command = " ".join(process.cmdline())
            if "_trial" in command:
                return
            kind = next((kind for kind in KINDS if kind in command), None)
            if kind is not None:
                key = KINDS[kind], kind
                self._most[key] = max(self._most[key], resident(process.pid))


def resident(pid: int) -> int:
    """Anonymous and mapped from ordinary files, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
