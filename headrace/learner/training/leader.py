"""The learner on several ranks: rank 0 runs the loop and leads, the others follow, each on its device.

`Leader` is the trainer of rank 0: whatever it does, it tells the others first, and all do it together. A follower has
no Redis, no HTTP and no clock of its own; it ends when rank 0 says so, or is gone.
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
from headrace.learner.distributed.rank_calls import Build, Copy, End, Gather, Load, Train, Write, Written
from headrace.learner.distributed.ranks import RankLost, Ranks
from headrace.learner.model.packing import current_version
from headrace.learner.model.policy import Policy, load_model, pick_device
from headrace.learner.training.trainer import Probe, Trainer, nothing_fresh

ASK_S = 0.2
"""Between two looks at whether the other ranks have written their part of a checkpoint."""
_log = logging.getLogger(__name__)


class _Saved(msgspec.Struct):
    """What became of one rank's part of a checkpoint."""

    files: dict[str, FileEntry]
    problem: str = ""


def lead(config: RunConfig, ranks: Ranks) -> Trainer:
    """The trainer, over all ranks. Raises `ValueError` if the model cannot be loaded or sharded."""
    if ranks.is_alone:
        return Trainer(config, Policy(config.model, config.learner))
    loaded = load_model(config.model, config.learner, ranks)  # the others are not told to wait for it
    with ranks.told(Build(_to_json(config))):
        return Leader(config, Policy(config.model, config.learner, ranks, loaded))


class Leader(Trainer):
    """Tells the other ranks to do as it does. Everything raises `RankLost` when one is gone."""

    def train(
        self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int], probe: Probe = nothing_fresh
    ) -> dict[str, float]:
        used = {span.version for group in groups for rollout in group.rollouts for span in rollout.version_spans}
        if (current := current_version(step, version_steps)) is not None:
            used.add(current)
        steps = {version: step_of(version, version_steps) for version in used}
        with self.ranks.told(Train(_to_json(self.config), [encode(group) for group in groups], step, steps)):
            return super().train(groups, step, steps, probe)

    def copy_state(self) -> None:
        with self.ranks.told(Copy()):
            super().copy_state()

    def write_copy(self, folder: Path) -> dict[str, FileEntry]:
        """All ranks' files, in a folder that all of them see. The ranks write while they train, and are asked between
        two steps whether they have done so. Raises `OSError` if any rank's disk refuses."""
        with self.ranks.told(Write(str(folder.resolve()))):
            pass
        own = _write(self, folder)
        while not all(parts := self._what_was_written(own)):
            time.sleep(ASK_S)
        saved = [msgspec.msgpack.decode(part, type=_Saved) for part in parts]
        problems = [f"rank {rank}: {one.problem}" for rank, one in enumerate(saved) if one.problem]
        if problems:
            raise OSError("; ".join(problems))
        return {name: entry for one in saved for name, entry in one.files.items()}

    def _what_was_written(self, own: bytes) -> list[bytes]:
        with self.ranks.told(Written()):
            return self.ranks.gather(own)

    def load_state(self, folder: Path, files: Sequence[str]) -> None:
        with self.ranks.told(Load(str(folder.resolve()), list(files))):
            super().load_state(folder, files)


def follow(ranks: Ranks) -> int:
    """Does what rank 0 says until it says to end; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 is told as well, and may want a checkpoint
    try:
        return _obey(ranks)
    except RankLost as error:
        _log.error("rank %d ends: rank 0 or another is gone: %s", ranks.rank, error)
    except Exception:  # noqa: BLE001 - the process's top
        _log.exception("rank %d failed", ranks.rank)
    return 1


def _obey(ranks: Ranks) -> int:
    trainer: Trainer | None = None
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    writing: Future[bytes] | None = None
    while not isinstance(call := ranks.hear(), End):
        if isinstance(call, Build):
            config = RunConfig.model_validate_json(call.config)
            set_up_torch(config, ranks)
            trainer = Trainer(config, Policy(config.model, config.learner, ranks))
            continue
        assert trainer is not None, call
        if isinstance(call, Train):
            trainer.config = RunConfig.model_validate_json(call.config)
            trainer.train([decode_group(group) for group in call.groups], call.step, call.version_steps)
        elif isinstance(call, Gather):
            trainer.policy.sharded[call.name].gather()
        elif isinstance(call, Copy):
            trainer.copy_state()
        elif isinstance(call, Write):
            writing = writer.submit(_write, trainer, Path(call.folder))
        elif isinstance(call, Written):
            assert writing is not None
            ranks.gather(writing.result() if writing.done() else b"")
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
    """A disk that refuses is reported: the ranks go on."""
    try:
        saved = _Saved(Trainer.write_copy(trainer, folder))
    except (OSError, SafetensorError) as error:
        saved = _Saved({}, str(error))
    return msgspec.msgpack.encode(saved)


def _to_json(config: RunConfig) -> bytes:
    return config.model_dump_json(exclude={"redis_url"}).encode()
