"""The Compose stack on a real Docker engine, under a project's name of its own: brought up, watched, struck, removed.

Every wait has a deadline, and ends with what was last seen, the containers and their last lines. `remove` leaves
nothing of the project: no container, network, volume or image; other projects are never touched.
"""

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from tests.support.fake_services import ROOT
from tests.support.guard import GUARD_S

POLL_S = 0.5
BUILD_TIMEOUT_S = 1500.0
DEADLINE_S = 900.0
"""Most of it is for a start of SGLang on cores that are busy with everything else."""
SERVICES = ("learner", "generation", "control")
Found = TypeVar("Found")


def docker(*arguments: str, timeout_s: float = GUARD_S, **variables: str) -> str:
    """What it prints. An `AssertionError` with all of it if it fails."""
    command = ["docker", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def engine_problem() -> str:
    """Why nothing can be tried here; empty where an engine with Compose answers."""
    if shutil.which("docker") is None:
        return "there is no docker"
    for command in ("info", "compose version"):
        done = subprocess.run(["docker", *command.split()], capture_output=True, text=True, timeout=GUARD_S)
        if done.returncode:
            return f"`docker {command}` says: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return ""


class Container:
    """As it was when it was looked at."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.id: str = found["Id"]
        self.pid: int = found["State"]["Pid"]
        self.is_running: bool = found["State"]["Running"]
        self.health: str = found["State"].get("Health", {}).get("Status", "none")
        self.num_restarts: int = found["RestartCount"]
        self.exit_code: int = found["State"]["ExitCode"]

    def __str__(self) -> str:
        service = self.found["Config"]["Labels"]["com.docker.compose.service"]
        state, restarts = self.found["State"]["Status"], f"{self.num_restarts} restarts"
        return f"{service} {self.id[:12]}: {state}, {self.health}, {restarts}, exit code {self.exit_code}"


class Stack:
    """`settings` of the recipe, as of `--set`."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.project = f"headrace-test-{secrets.token_hex(4)}"
        self.run = "composed"
        command = ["--config", "configs/tiny-cpu.yaml", *(part for setting in settings for part in ("--set", setting))]
        override = folder / "override.yml"
        override.write_text(yaml.safe_dump({"services": {"learner": {"command": command}}}))
        self._arguments = ["compose", "-p", self.project, "-f", "docker-compose.yml", "-f", str(override)]
        # Port 0: the engine takes a free one, another one at each start.
        self._variables = {"HEADRACE_RUN": self.run, "HEADRACE_TAG": self.project}
        self._variables |= {"HEADRACE_PORT": "0", "HEADRACE_CONTROL_PORT": "0"}
        self._began_at = time.monotonic()
        self._control = ""

    def compose(self, *arguments: str, timeout_s: float = GUARD_S) -> str:
        return docker(*self._arguments, *arguments, timeout_s=timeout_s, **self._variables)

    def build(self) -> None:
        self.compose("build", "--progress", "plain", timeout_s=BUILD_TIMEOUT_S)

    def remove(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans")
        docker("image", "rm", "--force", *(f"headrace-{service}:{self.project}" for service in SERVICES))

    def say(self, text: str) -> None:
        """In the test's output: how long each phase takes."""
        print(f"[{time.monotonic() - self._began_at:6.1f} s] {text}", flush=True)

    def containers(self, service: str) -> list[Container]:
        """In the order of their numbers, those that have ended included."""
        ids = self.compose("ps", "--all", "--quiet", service).split()
        found = json.loads(docker("inspect", *ids)) if ids else []
        found.sort(key=lambda one: int(one["Config"]["Labels"]["com.docker.compose.container-number"]))
        return [Container(one) for one in found]

    def container(self, service: str) -> Container:
        [found] = self.containers(service)
        return found

    def ask(self, path: str, method: str = "GET") -> Any:
        """Of control."""
        headers = {} if method == "GET" else {"Authorization": f"Bearer {self.token()}"}
        self._control = self._control or self.compose("port", "control", "8080").strip()
        try:
            url = f"http://{self._control}{path}"
            return httpx.request(method, url, headers=headers, timeout=20, trust_env=False).raise_for_status().json()
        except httpx.HTTPError:
            self._control = ""  # it may have been started again, at another port
            raise

    def token(self) -> str:
        return self.compose("exec", "-T", "generation", "cat", f"/runs/{self.run}/token").strip()

    def step(self) -> int:
        return int(self.ask("/status")["step"])

    def replicas(self) -> dict[str, int]:
        """Groups that each live replica has committed, by its name, which begins with its container's id."""
        found = self.ask("/replicas")["replicas"]
        return {one["id"]: one["groups_committed"] for one in found}

    def wait_for(self, what: str, look: Callable[[], Found], enough: Callable[[Found], bool]) -> Found:
        """The first that `look` finds which is enough. What cannot be asked now is asked again."""
        deadline = time.monotonic() + DEADLINE_S
        seen: object = None
        while time.monotonic() < deadline:
            try:
                found = look()
                seen = found
                if enough(found):
                    self.say(what)
                    return found
            except (AssertionError, httpx.HTTPError) as error:
                seen = f"{type(error).__name__}: {error}"
            time.sleep(POLL_S)
        raise AssertionError(f"not within {DEADLINE_S:g} s: {what}; last seen: {seen}\n{self.describe()}")

    def wait_for_health(self, service: str) -> None:
        self.wait_for(f"{service} is healthy", lambda: self.container(service), lambda found: found.health == "healthy")

    def wait_for_steps(self, count: int) -> int:
        """More, from now on; a learner that has gone back to its checkpoint has to come by itself again."""
        first = self.wait_for("control answers", self.step, lambda _: True)
        return self.wait_for(f"{count} steps from {first}", self.step, lambda step: step >= first + count)

    def wait_for_replicas(self, count: int) -> dict[str, int]:
        """So many, and no other; each has committed a group."""
        what = f"{count} at work"
        return self.wait_for(what, self.replicas, lambda found: len(found) == count and all(found.values()))

    def kill(self, service: str) -> None:
        """-9 for the main process of the service's first container, by its id on the host; until it is back."""
        before = self.containers(service)[0]
        # From a container, since the engine may be on a machine of its own, and its processes another user's.
        strike = ["--rm", "--privileged", "--pid", "host", "--user", "root", "--entrypoint", "sh", "redis:7"]
        docker("run", *strike, "-c", f"kill -9 {before.pid}")

        def is_back(found: list[Container]) -> bool:
            return found[0].num_restarts > before.num_restarts and found[0].health == "healthy"

        self.wait_for(f"{service} is killed and back", lambda: self.containers(service), is_back)

    def audit(self) -> str:
        """Of the run as it stands; the learner may have ended."""
        tool = ["run", "--rm", "--no-deps", "-T", "--entrypoint", "headrace", "learner"]
        return self.compose(*tool, "audit", "--run", self.run, "--runs-folder", "/runs")

    def describe(self) -> str:
        parts = []
        for arguments in (["ps", "--all"], ["logs", "--no-color", "--tail", "40"]):
            try:
                parts.append(self.compose(*arguments))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                parts.append(str(error))
        return "\n".join(parts)
