"""Experiment trackers: sends the numbers of every row to the trackers that the configuration names.

A tracker cannot slow training down: all of them run in one thread, behind a bounded queue. A tracker that fails is
logged once and dropped. Rows are discarded while the queue is full; the number of discarded rows is logged at the end.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from headrace.learner.store.row_numbers import Number, numbers_of

MAX_QUEUED_ROWS = 1000
CLOSE_TIMEOUT_S = 30.0
PROJECT = "headrace"
ROW_KINDS = ("step", "evaluation")
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Logs `numbers`, by `kind/name`; `kind/step` is one of them.

        Rows of one kind arrive in the order of their steps. An evaluation belongs to an earlier step than the rows
        before it, and a learner that was killed repeats steps.
        """
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """Trackio's local database; nothing leaves the machine by default. A repeated step appears twice."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=folder.name, config=dict(config), resume="allow", embed=False)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


class WeightsAndBiases:
    """Weights & Biases, configured by its own environment variables (`WANDB_MODE`, `WANDB_API_KEY`).

    It drops rows whose step is below the last one's. So each row is a separate step there, and each kind of row is
    drawn over its own axis, `step/step` or `evaluation/step`. A repeated step appears twice.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=folder.name, id=folder.name, resume="allow", dir=folder, config=dict(config)
        )
        for kind in ROW_KINDS:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers))

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


class Trackers:
    """The trackers `names` of the run in `folder`, resumed after `step`; without `names` there is no thread."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._rows: queue.Queue[Mapping[str, Number] | None] = queue.Queue(MAX_QUEUED_ROWS)
        self._num_discarded = 0
        self._thread = threading.Thread(
            target=self._run, args=(list(names), folder, config, step), name="trackers", daemon=True
        )
        if names:
            self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Queues the row and returns at once."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait({"kind": row["kind"]} | numbers_of(row))
        except queue.Full:
            self._num_discarded += 1

    def close(self) -> None:
        """Waits up to `CLOSE_TIMEOUT_S` until the queued rows are logged."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            self._num_discarded += self._rows.qsize()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._num_discarded or self._thread.is_alive():
            _log.warning("the trackers were too slow: %d rows were discarded", self._num_discarded)

    def _run(self, names: list[str], folder: Path, config: Mapping[str, Any], step: int) -> None:
        trackers: dict[str, Tracker] = {}
        for name in names:
            self._try(trackers, name, partial(self._start, trackers, name, folder, config, step))
        while trackers and (row := self._rows.get()) is not None:
            numbers = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
            for name, tracker in list(trackers.items()):
                self._try(trackers, name, partial(tracker.log, numbers, int(row["step"] or 0)))
        for name, tracker in list(trackers.items()):
            self._try(trackers, name, tracker.close)

    def _start(
        self, trackers: dict[str, Tracker], name: str, folder: Path, config: Mapping[str, Any], step: int
    ) -> None:
        trackers[name] = TRACKERS[name](folder, config, step)

    def _try(self, trackers: dict[str, Tracker], name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on without this tracker
            trackers.pop(name, None)
            _log.error("tracker %s failed and gets no more rows: %s: %s", name, type(error).__name__, error)
