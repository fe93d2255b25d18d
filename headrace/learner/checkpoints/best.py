"""The best policy so far, by held-out accuracy: the folder `best/` of the run, in Hugging Face format.

When an evaluation begins, the weights that were published last are written aside by a thread of its own, from the host
copy that is held of them anyway: nobody waits, and the run goes on to other weights. When the result is there they
become `best/` or go. `best/` is whole or not there; so is `best-next/`, which is about to become it. A later policy
must be better than the best, also over restarts; one of a line of weights that a crash has undone still counts.
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
FRAME = "model"
"""Of a run's folder: all of a policy but its weights, configuration and tokenizer."""
UNCHANGED = "model-unchanged"
"""Beside it: the published tensors that training does not change, and the names of those that it does."""
BEST_FILE = "best.json"
_log = logging.getLogger(__name__)


class Named(msgspec.Struct, frozen=True):
    """What `best.json` says: the step whose evaluation had this result, and its weight version."""

    step: int
    version: int
    held_out: float
    time_s: float


class Best:
    """Of one learner of a run; takes up what an earlier one has left in `run`."""

    def __init__(self, run: Path, epoch: int, check_fence: Callable[[], None]) -> None:
        self._run = run
        self._aside = run / f"{ASIDE}-{epoch:06d}"
        self._check_fence = check_fence
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="best")
        self._written: Future[None] | None = None
        self._evaluated = (0, 0)
        for left in run.glob(f"{ASIDE}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if (run / NEXT).exists():
            self._rename()
        self.standing = best_of(run)

    def set_aside(self, step: int, version: int, write_model: Callable[[Path], None]) -> None:
        """The evaluation of these weights begins; `write_model` writes them into a file, at any time."""
        self._evaluated = step, version
        self._written = self._writer.submit(self._write, write_model)

    def decide(self, held_out: float) -> bool:
        """The result is there: is it the best so far, and kept? A disk that refuses costs the policy, not the run."""
        written, self._written = self._written, None
        assert written is not None
        try:
            written.result()
            if self.standing is not None and held_out <= self.standing.held_out:
                shutil.rmtree(self._aside)
                return False
            self._keep(Named(*self._evaluated, held_out, time.time()))
        except OSError as error:
            self._check_fence()
            _log.error("the policy of step %d, the best so far, cannot be kept: %s", self._evaluated[0], error)
            shutil.rmtree(self._aside, ignore_errors=True)
            return False
        return True

    def close(self) -> None:
        self._writer.shutdown()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _write(self, write_model: Callable[[Path], None]) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)
        shutil.copytree(self._run / FRAME, self._aside)
        write_model(self._aside / MODEL_FILE)
        for path in (*self._aside.iterdir(), self._aside):
            fsync_path(path)

    def _keep(self, named: Named) -> None:
        (self._aside / BEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=2))
        fsync_path(self._aside / BEST_FILE)
        fsync_path(self._aside)
        self._check_fence()
        self._aside.rename(self._run / NEXT)
        self._rename()
        self.standing = named
        _log.info("step %d is the best so far: held-out %.4f, kept in %s", named.step, named.held_out, self._run / BEST)

    def _rename(self) -> None:
        fsync_path(self._run)
        shutil.rmtree(self._run / BEST, ignore_errors=True)
        (self._run / NEXT).rename(self._run / BEST)
        fsync_path(self._run)


def best_folder(run: Path) -> Path | None:
    """Where the best policy lies at this moment; None if there is none."""
    return next((run / name for name in (NEXT, BEST) if (run / name / BEST_FILE).is_file()), None)


def best_of(run: Path) -> Named | None:
    folder = best_folder(run)
    return None if folder is None else msgspec.json.decode((folder / BEST_FILE).read_bytes(), type=Named)
