"""The results of the staleness study's runs, stored in benchmarks/results/staleness.json as each run ends."""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.demo import ROOT
from benchmarks.staleness.runs import Run

RESULTS = ROOT / "benchmarks" / "results" / "staleness.json"


class Results:
    """By the name of the run: its settings, accuracy by step, and columns of its steps."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self._lock = Lock()
        self._rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, run: Run) -> dict[str, Any] | None:
        """The run's result; None if it was not run with its present settings."""
        row = self._rows.get(run.name)
        return row if row and row["settings"] == run.settings else None

    def add(self, run: Run, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows[run.name] = row
            lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(self._rows.items())]
            aside = self.path.with_suffix(".aside")
            aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            aside.replace(self.path)
