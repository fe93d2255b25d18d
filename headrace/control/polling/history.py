"""The numbers of a run in memory, as columns with one row per step, and the evaluations.

The last row of a step wins. A step that is repeated after a restart from an earlier checkpoint replaces its row and all
later ones. Responses are thinned evenly, and encoded responses are cached.
"""

import math
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import islice
from typing import Any

import msgspec

from headrace.control.models.history import Evaluation
from headrace.control.polling.redis_poll import Entry, parse_entry_id

MAX_COLUMNS = 200
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}|environment/[!-~]{1,100}")
"""Of the numbers of a row; a task chooses what is behind environment/."""
MAX_ANSWERS = 16
"""Encoded responses in the cache, for many pages with the same request."""
RENAMED = {"time_s": "at"}


class RunHistory:
    def __init__(self) -> None:
        self._ids: list[tuple[int, int]] = []
        self._columns: dict[str, array[float]] = {"step": array("d")}
        """NaN: the row has no such number."""
        self._evaluations: dict[int, tuple[tuple[int, int], Evaluation]] = {}
        self._last_id = "0-0"
        self._answers: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def evaluations(self) -> list[Evaluation]:
        return [self._evaluations[step][1] for step in sorted(self._evaluations)]

    def add(self, entry: Entry) -> tuple[str, Any] | None:
        """Adds a row; returns its kind with the numbers of the step or the evaluation, or None for an invalid row."""
        entry_id, fields = entry
        kind = fields.get(b"kind")
        try:
            row = msgspec.json.decode(fields.get(b"row", b""), type=dict[str, Any])
        except (ValueError, RecursionError):
            return None
        numbers = _numbers(row)
        step = numbers.get("step", math.nan)
        if not (0 <= step < 2**53):
            return None
        self._last_id = entry_id
        if kind == b"step":
            self._add_step(entry_id, numbers)
            return "step", self.row(len(self) - 1)
        if kind == b"evaluation" and (evaluation := _evaluation(row, numbers)):
            self._evaluations[evaluation.step] = (parse_entry_id(entry_id), evaluation)
            return "evaluation", evaluation
        return None

    def _add_step(self, entry_id: str, numbers: dict[str, float]) -> None:
        step, steps = numbers["step"], self._columns["step"]
        keep = len(steps)
        while keep and steps[keep - 1] >= step:
            keep -= 1
        if keep < len(steps):
            del self._ids[keep:]
            for column in self._columns.values():
                del column[keep:]
            self._evaluations = {at: kept for at, kept in self._evaluations.items() if at < step}
        for name in numbers:
            if name not in self._columns and len(self._columns) < MAX_COLUMNS:
                self._columns[name] = array("d", [math.nan] * len(self._ids))
        self._ids.append(parse_entry_id(entry_id))
        for name, column in self._columns.items():
            column.append(numbers.get(name, math.nan))

    def row(self, index: int) -> dict[str, float | None]:
        return {name: _or_none(column[index]) for name, column in self._columns.items()}

    def latest(self, name: str, count: int) -> list[float]:
        """The values of `name` in the last `count` steps, the newest last, without steps that have none."""
        column = self._columns.get(name)
        return [] if column is None else [value for value in column[-count:] if not math.isnan(value)]

    def latest_reported(self, name: str, count: int) -> list[float]:
        """The last `count` values of `name`, however many steps ago, the newest last."""
        values = (value for value in reversed(self._columns.get(name, ())) if not math.isnan(value))
        return list(islice(values, count))[::-1]

    def encoded_response(self, after: str, max_points: int) -> bytes:
        """`History` as JSON."""
        asked = (self._last_id, after, max_points)
        if asked not in self._answers:
            self._answers[asked] = self._encode(parse_entry_id(after) if after else (0, 0), max_points)
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        return self._answers[asked]

    def _encode(self, after: tuple[int, int], max_points: int) -> bytes:
        first, total = bisect_right(self._ids, after), len(self._ids)
        chosen = evenly_spaced(first, total, max_points)
        evaluations = [one.model_dump() for entry_id, one in self._evaluations.values() if entry_id > after]
        return msgspec.json.encode(
            {
                "cursor": self._last_id,
                "steps": {
                    name: [_or_none(column[index]) for index in chosen] for name, column in self._columns.items()
                },
                "evaluations": sorted(evaluations, key=lambda one: one["step"]),
                "num_steps": total - first,
            }
        )


def evenly_spaced(first: int, end: int, max_points: int) -> list[int]:
    """At most `max_points` indices of `[first, end)`, the first and the last among them."""
    count = end - first
    if count <= max_points:
        return list(range(first, end))
    if max_points == 1:
        return [end - 1]
    return [first + round(place * (count - 1) / (max_points - 1)) for place in range(max_points)]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in row.items():
        if NAME.fullmatch(name) and isinstance(value, int | float) and abs(value) < 1e300:
            found[RENAMED.get(name, name)] = float(value)
    return found


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _evaluation(row: dict[str, Any], numbers: dict[str, float]) -> Evaluation | None:
    if "held_out" not in numbers:
        return None
    version = numbers.get("weight_version")
    return Evaluation(
        step=int(numbers["step"]),
        held_out=numbers["held_out"],
        pass_at={name[8:]: value for name, value in numbers.items() if re.fullmatch("pass_at_[0-9]{1,6}", name)},
        num_completions=int(numbers.get("num_completions", 0)),
        num_dead=int(numbers.get("num_dead", 0)),
        first_token_step_mean=numbers.get("first_token_step_mean", 0.0),
        weight_version=None if version is None else int(version),
        is_best=row.get("is_best") is True,
        at=numbers.get("at", 0.0),
    )
