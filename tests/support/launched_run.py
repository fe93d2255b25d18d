"""`headrace up` of the real services as a child: its lines waited for, its processes killed, what it leaves read."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.fake_services import ROOT
from tests.support.guard import GUARD_S

END_TIMEOUT_S = 1800.0
"""A guard against hanging, also on a machine ten times slower."""
START = f"""
from headrace.launcher import __main__, up
up.LEARNER_GRACE_S = up.REPLICA_GRACE_S = up.CONTROL_GRACE_S = {GUARD_S}
__main__.main()
"""
"""`headrace` with times to stop that no slow machine exceeds."""


def short_run(steps: int) -> list[str]:
    """Settings of a run of seconds that checkpoints and evaluates, and whose engine no slow machine makes look dead."""
    return [
        f"learner.steps={steps}",
        "learner.groups_per_step=4",
        "learner.checkpoint_interval_steps=2",
        "evaluation.num_prompts=16",
        "evaluation.interval_steps=2",
        f"generation.engine.liveness_timeout_s={GUARD_S:g}",
    ]


class Launched:
    """`headrace up` of the run; its lines can be waited for, and its processes killed."""

    def __init__(
        self,
        runs: Path,
        seen: set[psutil.Process],
        settings: Sequence[str],
        run: str = "short",
        recipe: str = "configs/tiny-cpu.yaml",
    ) -> None:
        """`seen` gathers every process that it is seen to have."""
        command = [sys.executable, "-c", START, "up", recipe, "--run", run]
        chosen = [part for setting in settings for part in ("--set", setting)]
        self.process = subprocess.Popen(
            [*command, "--runs-folder", str(runs), *chosen],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.run = runs / run
        self.seen = seen
        self.output = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
                return
        raise AssertionError(f"no line with {text!r} in:\n{self.output}")

    def kill(self, *modules: str) -> None:
        """Children, as the kernel might."""
        children = psutil.Process(self.process.pid).children()
        chosen = [child for child in children if set(modules) & set(child.cmdline())]
        assert len(chosen) == len(modules), children
        for child in chosen:
            child.kill()

    def end(self) -> str:
        rest, _ = self.process.communicate(timeout=END_TIMEOUT_S)
        assert self.process.returncode == 0, self.output + rest
        return self.output + rest


def rows_of(run: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def steps_in(run: Path) -> list[float]:
    return [row["step"] for row in rows_of(run, "step")]


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
