"""The best policy so far, by held-out accuracy: the folder `best/` of the run, in Hugging Face format.

When an evaluation begins, a thread writes the weights that were published last to `best-aside-<epoch>/`, from the host
copy that exists anyway; the run does not wait. When the result is known, this candidate becomes `best/` or is deleted.
`best/` is complete or absent, and so is `best-next/`, which is about to be renamed to `best/`. A later policy replaces
it only if it is better, also after restarts; a policy whose steps were undone by a crash still counts.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from headrace.common.process.atomic_files import fsync_path
from headrace.common.weights.files import MODEL_FILE

BEST, NEXT, ASIDE = "best", "best-next", "best-aside"
CONFIG_FOLDER = "model"
"""Folder in the run's folder with a policy's files except the weights: configuration and tokenizer."""
UNCHANGED_FOLDER = "model-unchanged"
"""Folder beside it: the published tensors that training does not change, and the names of those that it changes."""
BEST_FILE = "best.json"
_log = logging.getLogger(__name__)


class BestRecord(msgspec.Struct, frozen=True):
    """The contents of `best.json`: the evaluation's step, weight version and result."""

    step: int
    version: int
    held_out: float
    time_s: float


class BestPolicy:
    """Keeps the best policy in the folder `run`; continues from what an earlier learner has left there."""

    def __init__(self, run: Path, epoch: int, check_fence: Callable[[], None]) -> None:
        self._run = run
        self._aside = run / f"{ASIDE}-{epoch:06d}"
        self._check_fence = check_fence
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="best")
        self._written: Future[None] | None = None
        self._evaluated = (0, 0)
        for left in run.glob(f"{ASIDE}-*"):
            if left.name <= self._aside.name:  # else of a learner that has overtaken this one
                shutil.rmtree(left, ignore_errors=True)
        if (run / NEXT).exists():
            self._rename()
        self.record = read_best_record(run)

    def write_candidate(self, step: int, version: int, write_model: Callable[[Path], None]) -> None:
        """Starts to write the weights whose evaluation begins; `write_model` writes them to a file, in any thread."""
        self._evaluated = step, version
        self._written = self._writer.submit(self._write, write_model)

    def keep_if_best(self, held_out: float) -> bool:
        """Keeps the candidate if its result is the best so far; returns whether it was kept. If the disk refuses, the
        candidate is lost and the run goes on."""
        written, self._written = self._written, None
        assert written is not None
        try:
            written.result()
            if self.record is not None and held_out <= self.record.held_out:
                shutil.rmtree(self._aside)
                return False
            self._keep(BestRecord(*self._evaluated, held_out, time.time()))
        except OSError as error:
            self._check_fence()
            _log.error("the policy of step %d, the best so far, cannot be saved: %s", self._evaluated[0], error)
            shutil.rmtree(self._aside, ignore_errors=True)
            return False
        return True

    def close(self) -> None:
        self._writer.shutdown()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _write(self, write_model: Callable[[Path], None]) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)
        shutil.copytree(self._run / CONFIG_FOLDER, self._aside)
        write_model(self._aside / MODEL_FILE)
        for path in (*self._aside.iterdir(), self._aside):
            fsync_path(path)

    def _keep(self, record: BestRecord) -> None:
        (self._aside / BEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        fsync_path(self._aside / BEST_FILE)
        fsync_path(self._aside)
        self._check_fence()
        self._aside.rename(self._run / NEXT)
        self._rename()
        self.record = record
        folder = self._run / BEST
        _log.info("step %d is the best so far: held-out %.4f, saved in %s", record.step, record.held_out, folder)

    def _rename(self) -> None:
        fsync_path(self._run)
        shutil.rmtree(self._run / BEST, ignore_errors=True)
        (self._run / NEXT).rename(self._run / BEST)
        fsync_path(self._run)


def best_folder(run: Path) -> Path | None:
    """The folder that has the best policy at this moment; None if there is none."""
    return next((run / name for name in (NEXT, BEST) if (run / name / BEST_FILE).is_file()), None)


def read_best_record(run: Path) -> BestRecord | None:
    folder = best_folder(run)
    return None if folder is None else msgspec.json.decode((folder / BEST_FILE).read_bytes(), type=BestRecord)
