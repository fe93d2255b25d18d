"""The learner on several ranks: rank 0 runs the loop, the other ranks execute its calls, each on its device.

`LeaderTrainer` is the trainer of rank 0: it sends each of its operations to the other ranks, and all execute it
together. The others use neither Redis nor HTTP nor a clock; they end when rank 0 tells them to, or when it is gone.
"""

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError

from headrace.common.config import RunConfig
from headrace.common.process.atomic_files import FileEntry
from headrace.common.wire import Group, decode_group, encode
from headrace.learner.algorithm.staleness import step_of
from headrace.learner.distributed.rank_calls import (
    BuildPolicy,
    CopyState,
    Exit,
    GatherWeight,
    LoadState,
    PollWrite,
    TrainStep,
    WriteState,
)
from headrace.learner.distributed.ranks import RankLost, Ranks
from headrace.learner.model.packing import current_version
from headrace.learner.model.policy import Policy, load_model, pick_device
from headrace.learner.training.trainer import Probe, Trainer, no_probe

WRITE_POLL_S = 0.2
"""Interval at which rank 0 asks whether the other ranks have written their part of a checkpoint."""
_log = logging.getLogger(__name__)


class _WriteResult(msgspec.Struct):
    """The result of writing one rank's part of a checkpoint; `problem` is empty on success."""

    files: dict[str, FileEntry]
    problem: str = ""


def build_trainer(config: RunConfig, ranks: Ranks) -> Trainer:
    """Rank 0's trainer. Raises `ValueError` if the model cannot be loaded or sharded."""
    if ranks.is_alone:
        return Trainer(config, Policy(config.model, config.learner))
    loaded = load_model(config.model, config.learner, ranks)  # before the call, so that the others need not wait
    with ranks.call_others(BuildPolicy(_to_json(config))):
        return LeaderTrainer(config, Policy(config.model, config.learner, ranks, loaded))


class LeaderTrainer(Trainer):
    """A trainer that calls the other ranks to do the same. Every method raises `RankLost` when a rank is gone."""

    def train(
        self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int], probe: Probe = no_probe
    ) -> dict[str, float]:
        used = {span.version for group in groups for segment in group.segments for span in segment.version_spans}
        if (current := current_version(step, version_steps)) is not None:
            used.add(current)
        steps = {version: step_of(version, version_steps) for version in used}
        with self.ranks.call_others(TrainStep(_to_json(self.config), [encode(group) for group in groups], step, steps)):
            return super().train(groups, step, steps, probe)

    def copy_state(self) -> None:
        with self.ranks.call_others(CopyState()):
            super().copy_state()

    def write_copy(self, folder: Path) -> dict[str, FileEntry]:
        """Writes all ranks' files into a folder that all of them can access. The ranks write while they train; rank 0
        polls them between calls. Raises `OSError` if a rank cannot write."""
        with self.ranks.call_others(WriteState(str(folder.resolve()))):
            pass
        own = _write(self, folder)
        while not all(parts := self._poll_writes(own)):
            time.sleep(WRITE_POLL_S)
        saved = [msgspec.msgpack.decode(part, type=_WriteResult) for part in parts]
        problems = [f"rank {rank}: {one.problem}" for rank, one in enumerate(saved) if one.problem]
        if problems:
            raise OSError("; ".join(problems))
        return {name: entry for one in saved for name, entry in one.files.items()}

    def _poll_writes(self, own: bytes) -> list[bytes]:
        with self.ranks.call_others(PollWrite()):
            return self.ranks.gather_bytes(own)

    def load_state(self, folder: Path, files: Sequence[str]) -> None:
        with self.ranks.call_others(LoadState(str(folder.resolve()), list(files))):
            super().load_state(folder, files)


def run_follower(ranks: Ranks) -> int:
    """Executes rank 0's calls until the last one; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets them as well, and may need the others for a checkpoint
    try:
        return _run_calls(ranks)
    except RankLost as error:
        _log.error("rank %d ends: rank 0 or another is gone: %s", ranks.rank, error)
    except Exception:  # noqa: BLE001 - the process's top
        _log.exception("rank %d failed", ranks.rank)
    return 1


def _run_calls(ranks: Ranks) -> int:
    trainer: Trainer | None = None
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    writing: Future[bytes] | None = None
    while not isinstance(call := ranks.receive_call(), Exit):
        if isinstance(call, BuildPolicy):
            config = RunConfig.model_validate_json(call.config)
            set_up_torch(config, ranks)
            trainer = Trainer(config, Policy(config.model, config.learner, ranks))
            continue
        assert trainer is not None, call
        if isinstance(call, TrainStep):
            trainer.config = RunConfig.model_validate_json(call.config)
            trainer.train([decode_group(group) for group in call.groups], call.step, call.version_steps)
        elif isinstance(call, GatherWeight):
            trainer.policy.sharded[call.name].gather()
        elif isinstance(call, CopyState):
            trainer.copy_state()
        elif isinstance(call, WriteState):
            writing = writer.submit(_write, trainer, Path(call.folder))
        elif isinstance(call, PollWrite):
            assert writing is not None
            ranks.gather_bytes(writing.result() if writing.done() else b"")
        else:
            trainer.load_state(Path(call.folder), call.files)
    return call.code


def set_up_torch(config: RunConfig, ranks: Ranks) -> None:
    if config.learner.num_threads is not None:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed + ranks.rank)
    device, fraction = pick_device(config.learner.device), config.learner.memory_fraction
    if device.type == "cuda" and fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, ranks.local_rank)


def _write(trainer: Trainer, folder: Path) -> bytes:
    """Writes the copied state; an error is part of the result, and the rank goes on."""
    try:
        saved = _WriteResult(Trainer.write_copy(trainer, folder))
    except (OSError, SafetensorError) as error:
        saved = _WriteResult({}, str(error))
    return msgspec.msgpack.encode(saved)


def _to_json(config: RunConfig) -> bytes:
    return config.model_dump_json(exclude={"redis_url"}).encode()
