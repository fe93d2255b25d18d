"""What a person or an autoscaler orders of a run: fields of its hash `control` in Redis."""

import re

DESIRED_REPLICAS = "desired_replicas"
"""How many replicas the run's launcher keeps; no such field: nobody has ordered any number."""
MAX_REPLICAS = 64
"""Of one launcher, which is one machine."""


def desired_replicas(text: str) -> int:
    """The number that is ordered. Raises `ValueError` naming what is none."""
    if not (re.fullmatch("[0-9]{1,4}", text) and int(text) <= MAX_REPLICAS):
        raise ValueError(f"{text[:40]!r} replicas: expected a number from 0 to {MAX_REPLICAS}")
    return int(text)
