"""`headrace` with short scripts in the place of its services: where only the launcher is tested.

The launcher starts a service as `sys.executable -m MODULE ...`. Here that is an executable that runs the script
given for the module, with `redis`, `note` and `option` at hand; everything else is the real thing.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import indent

import psutil
import pytest

from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]
RECIPE = "configs/tiny-cpu.yaml"
SERVES = "note('serves'); signal.pause()"
"""Until a signal, of which it dies."""
IDLES = "signal.pause()"
"""The same, and it says nothing."""

_PRELUDE = f"""#!{sys.executable} -S
import os, pathlib, signal, socket, sys, time
module, arguments = sys.argv[2], sys.argv[3:]
notes = pathlib.Path(__file__).with_name("notes")

def option(name):
    return arguments[arguments.index(name) + 1]

def note(text):
    with notes.open("a") as file:
        file.write(module.rpartition(".")[2] + " " + str(text) + "\\n")

def num_notes(text):
    return notes.read_text().splitlines().count(module.rpartition(".")[2] + " " + text) if notes.exists() else 0

def redis(*words):
    password, _, address = os.environ["HEADRACE_REDIS_URL"].removeprefix("redis://").rpartition("@")
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), {GUARD_S}) as connection, connection.makefile("rb") as answers:
        for line in (["AUTH", password.lstrip(":")], words) if password else (words,):
            connection.sendall((" ".join(str(word) for word in line) + "\\r\\n").encode())
            answer = answers.readline().decode().strip()
            if answer.startswith("$") and answer != "$-1":
                answer = answers.readline().decode().strip()
            elif answer.startswith("-"):
                raise OSError(answer)
    return answer

signal.signal(signal.SIGINT, signal.SIG_DFL)

def on(number, act):
    for one in (number, signal.SIGINT):
        signal.signal(one, lambda *_: act())

def tell_learner(**fields):
    for name, value in fields.items():
        redis("HSET", "headrace:{{" + option("--run") + "}}:learner", name, '"' + str(value) + '"')

"""


class Fakes:
    """Scripts by module below `services`, such as `{"learner": "sys.exit(4)"}`, and what they note."""

    def __init__(self, folder: Path, scripts: dict[str, str]) -> None:
        self.run = folder / "runs" / "faked"
        self.executable = folder / "fake-python"
        self.notes = folder / "notes"
        self.started: list[subprocess.Popen[str]] = []
        cases = [f"if module == 'headrace.{module}':\n{indent(script, '    ')}\n" for module, script in scripts.items()]
        self.executable.write_text(_PRELUDE + "".join(cases))
        self.executable.chmod(0o755)

    def headrace(self, *arguments: str, settings: str = "", **environment: str) -> subprocess.Popen[str]:
        """`settings` are statements that change the launcher's constants, such as `up.REPLICA_GRACE_S = 1`."""
        start = (
            f"import sys; sys.executable = {str(self.executable)!r}\n"
            "from headrace.launcher import __main__, up\n"
            "from headrace.launcher.supervision import liveness_probe, replica_target, restart_policy, supervisor\n"
            f"up.preflight_notes = lambda config: []\n{settings}\n__main__.main()"  # it would start scripts too
        )
        process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments, "--runs-folder", str(self.run.parent)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def up(self, *arguments: str, settings: str = "") -> subprocess.Popen[str]:
        return self.headrace("up", RECIPE, "--run", self.run.name, *arguments, settings=settings)

    def lines(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def note(self, line: str) -> None:
        with self.notes.open("a") as file:
            file.write(f"{line}\n")

    def wait_for(self, *lines: str, times: int = 1) -> None:
        """Until the scripts have noted each of `lines` so often."""
        until(
            lambda: all(self.lines().count(line) >= times for line in lines),
            f"{lines} noted",
            self._progress,
            self.are_over,
        )

    def _progress(self) -> str:
        """For an error: what was noted, and what launchers that have ended printed."""
        return f"noted {self.lines()}" + "".join(f"; ended: {one.communicate()[0]}" for one in self._ended())

    def _ended(self) -> list[subprocess.Popen[str]]:
        return [one for one in self.started if one.poll() is not None]

    def are_over(self) -> bool:
        """Whether nothing that could note something more is running."""
        return len(self._ended()) == len(self.started)

    def close(self) -> None:
        """The kernel ends what the launchers had started."""
        for process in self.started:
            process.kill()
            process.communicate()


def until(
    condition: Callable[[], bool],
    what: str,
    seen: Callable[[], object] = lambda: "",
    is_hopeless: Callable[[], bool] = lambda: False,
) -> None:
    """Fails when the condition is still false once it is hopeless, or after `GUARD_S`."""
    deadline = time.monotonic() + GUARD_S
    while not condition():
        was_hopeless = is_hopeless() or time.monotonic() > deadline
        assert not was_hopeless or condition(), f"expected {what}; {seen()}"
        time.sleep(0.02)


Faking = Callable[..., Fakes]


@pytest.fixture
def faking(tmp_path: Path) -> Iterator[Faking]:
    """Scripts by module, as keywords or a dictionary; a replica serves unless told otherwise, and control is there."""
    made: list[Fakes] = []

    def fake(others: dict[str, str] | None = None, generation: str = SERVES, **scripts: str) -> Fakes:
        made.append(Fakes(tmp_path, {"generation": generation, "control": IDLES, **scripts, **(others or {})}))
        return made[-1]

    yield fake
    for fakes in made:
        fakes.close()


def ended(process: subprocess.Popen[str], code: int) -> str:
    """What it printed. Fails unless it ends with `code`."""
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == code, output
    return output


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What it has printed so far, while it runs on. Fails if it ends without `text`."""
    assert process.stdout
    output = ""
    for line in process.stdout:
        output += line
        if text in output:
            return output
    raise AssertionError(f"expected {text!r}, it printed {output!r}")


def processes_of(run: Path) -> list[psutil.Process]:
    """Everything that works for the run or in it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(run) in " ".join([process.cwd(), *process.cmdline()]):
                found.append(process)
    return found


def redis_of(run: Path) -> psutil.Process:
    """The embedded server, whose working folder is its append-only file's."""
    (server,) = [process for process in processes_of(run) if process.cwd() == str(run / "redis")]
    return server
