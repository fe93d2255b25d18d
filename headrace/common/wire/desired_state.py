"""The desired state of a run, set by a person or an autoscaler: the fields of its hash `control` in Redis.

A request stays in force until it is withdrawn or carried out, also across restarts. An invalid value is treated as if
the field were absent.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

DESIRED_REPLICAS = "desired_replicas"
"""Field: the number of replicas that the run's launcher keeps; absent: no target is set."""
PAUSED = "paused"
"""Field; if present, no steps are taken and no tickets issued."""
STOP = "stop"
"""Field; if present, the run ends after the step in progress, with a checkpoint; the learner then removes it."""
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
"""Fields: how many were ever requested; the learner acts when one of these two counters grows."""
SETTINGS = "settings"
"""Field: `Settings` as JSON."""
MAX_REPLICAS = 64
"""Largest number of replicas of one launcher, and so of one machine."""


class Settings(msgspec.Struct, frozen=True):
    """The settings that were changed while the run is live (headrace/common/config/hot_reload.py).

    `values` has every setting that differs from the configuration, by dotted name as in a recipe. `version` grows by
    one with every change.
    """

    version: int = 0
    values: dict[str, int | float | None] = {}


class DesiredState(NamedTuple):
    """The parsed fields of `control`."""

    desired_replicas: int | None = None
    is_paused: bool = False
    is_stopping: bool = False
    checkpoints: int = 0
    evaluations: int = 0
    settings: Settings = Settings()


class Launcher(NamedTuple):
    """The launcher that keeps a run's replicas, as its presence key in Redis describes it."""

    process: str
    """Its machine and process, for messages."""
    max_replicas: int = MAX_REPLICAS
    """The number for which its machine has devices."""

    def __str__(self) -> str:
        return f"{self.process}, up to {self.max_replicas} replicas"

    def check_capacity(self, replicas: int) -> None:
        """Raises `ValueError` for more replicas than the machine has devices for."""
        if replicas > self.max_replicas:
            raise ValueError(
                f"{replicas} replicas: the run's launcher has GPUs for {self.max_replicas}; expected "
                f"{self.max_replicas} at most, or replicas on other machines, which join by themselves"
            )


def parse_launcher(text: str) -> Launcher:
    found = re.fullmatch(r"(.*), up to ([0-9]{1,4}) replicas", text, re.DOTALL)
    return Launcher(found[1], int(found[2])) if found else Launcher(text)


def parse_desired_state(fields: Mapping[bytes, bytes]) -> DesiredState:
    """`fields`: the content of the hash `control`."""
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
    """The number of replicas. Raises `ValueError` for any other text."""
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
