"""What a person or an autoscaler orders of a run: fields of its hash `control` in Redis.

An order stands until it is withdrawn or has been obeyed, whatever is restarted meanwhile. What nobody could obey reads
as no order.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

DESIRED_REPLICAS = "desired_replicas"
"""How many replicas the run's launcher keeps; no such field: nobody has ordered any number."""
PAUSED = "paused"
"""Present: no steps and no tickets."""
STOP = "stop"
"""Present: the run ends after the step in progress, with a checkpoint; the learner removes it at its end."""
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
"""How many were ever asked for; the learner obeys when it sees one of these two grow."""
SETTINGS = "settings"
"""`Settings` as JSON."""
MAX_REPLICAS = 64
"""Of one launcher, which is one machine."""


class Settings(msgspec.Struct, frozen=True):
    """What was changed while the run goes on: dotted names as in a recipe (headrace/common/config/hot_reload.py), all
    of them that differ from its configuration. `version` grows by one with every change."""

    version: int = 0
    values: dict[str, int | float | None] = {}


class DesiredState(NamedTuple):
    """All that stands."""

    desired_replicas: int | None = None
    is_paused: bool = False
    is_stopping: bool = False
    checkpoints: int = 0
    evaluations: int = 0
    settings: Settings = Settings()


class Launcher(NamedTuple):
    """Who keeps a run's replicas, as its key in Redis tells."""

    process: str
    """Its machine and process, for people."""
    max_replicas: int = MAX_REPLICAS
    """As many as its machine has devices for."""

    def __str__(self) -> str:
        return f"{self.process}, up to {self.max_replicas} replicas"

    def check_capacity(self, replicas: int) -> None:
        """Raises `ValueError` for a number of replicas that it cannot keep."""
        if replicas > self.max_replicas:
            raise ValueError(
                f"{replicas} replicas: the run's launcher has GPUs for {self.max_replicas}; expected "
                f"{self.max_replicas} at most, or replicas on other machines, which join by themselves"
            )


def parse_launcher(text: str) -> Launcher:
    found = re.fullmatch(r"(.*), up to ([0-9]{1,4}) replicas", text, re.DOTALL)
    return Launcher(found[1], int(found[2])) if found else Launcher(text)


def parse_desired_state(fields: Mapping[bytes, bytes]) -> DesiredState:
    """Of the hash `control`."""
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    return DesiredState(
        desired_replicas=_desired_replicas(text.get(DESIRED_REPLICAS, "")),
        is_paused=PAUSED in text,
        is_stopping=STOP in text,
        checkpoints=_count(text.get(CHECKPOINTS, "")),
        evaluations=_count(text.get(EVALUATIONS, "")),
        settings=_settings(text.get(SETTINGS, "")),
    )


def parse_desired_replicas(text: str) -> int:
    """The number that is ordered. Raises `ValueError` naming what is none."""
    if not (re.fullmatch("[0-9]{1,4}", text) and int(text) <= MAX_REPLICAS):
        raise ValueError(f"{text[:40]!r} replicas: expected a number from 0 to {MAX_REPLICAS}")
    return int(text)


def _desired_replicas(text: str) -> int | None:
    try:
        return parse_desired_replicas(text)
    except ValueError:
        return None


def _count(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0


def _settings(text: str) -> Settings:
    try:
        return msgspec.json.decode(text, type=Settings)
    except msgspec.DecodeError:
        return Settings()
