"""A learner's trainer on several ranks, as torchrun starts it: takes the steps of a file of jobs.

torchrun --standalone --nproc-per-node 2 -m tests.support.trainer_ranks JOBS.msgpack
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from headrace.common.config import RunConfig
from headrace.common.wire import decode_group
from headrace.learner.distributed.join import join
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.model.logprobs import TokenScores
from headrace.learner.model.packing import MicroBatch
from headrace.learner.training.leader import build_trainer, run_follower
from headrace.learner.training.trainer import Trainer
from tests.support.guard import GUARD_S
from tests.support.replay import ROOT

VERSION_STEPS = {1: 0, 2: 1}


class Job(msgspec.Struct):
    """What a trainer is made of, and which steps it takes."""

    name: str
    config: dict[str, Any]
    groups: list[bytes]
    first_step: int = 0
    num_steps: int = 5
    resume: str = ""
    """Folder to load the state from."""
    poisoned_step: int = -1
    """The step in which the log-probabilities of one micro-batch of rank 0 are NaN."""


def do(job: Job, folder: Path, ranks: Ranks) -> None:
    """Writes the metrics of each step, the state at the start, after the first step and at the end, and the weights
    before and after."""
    trainer = build_trainer(RunConfig.model_validate(job.config), ranks)
    if job.resume:
        trainer.load_state(Path(job.resume), [path.name for path in Path(job.resume).iterdir()])
    groups = [decode_group(group) for group in job.groups]
    save(trainer, folder / "start")
    save_weights(trainer, folder / "before.safetensors")
    rows = []
    for step in range(job.first_step, job.first_step + job.num_steps):
        score = trainer.policy.score
        if step == job.poisoned_step:
            trainer.policy.score = partial(poisoned, score)  # type: ignore[method-assign]
        rows.append(trainer.train(groups, step, VERSION_STEPS, lambda: groups[0]))
        trainer.policy.score = score  # type: ignore[method-assign]
        if step == job.first_step:
            save(trainer, folder / "first")
    save(trainer, folder / "end")
    (folder / "rows.json").write_text(json.dumps(rows))
    save_weights(trainer, folder / "weights.safetensors")


def save_weights(trainer: Trainer, file: Path) -> None:
    """Saves the weights as they are published."""
    save_file(
        {name: weight.detach().clone().contiguous() for name, weight in trainer.policy.published_weights().items()},
        file,
    )


def poisoned(score: Callable[[MicroBatch], TokenScores], micro_batch: MicroBatch) -> TokenScores:
    scored = score(micro_batch)
    return scored._replace(logprobs=scored.logprobs * float("nan"))


def save(trainer: Trainer, folder: Path) -> None:
    folder.mkdir(parents=True)
    trainer.copy_state()
    trainer.write_copy(folder)


def do_on_ranks(num_ranks: int, jobs: list[Job], root: Path) -> None:
    """Runs each job; its results are in a folder of its name."""
    root.mkdir()
    path = root / "jobs.msgpack"
    path.write_bytes(msgspec.msgpack.encode(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (root / "log").open("w")
    agent = subprocess.Popen(
        [*command, "-m", "tests.support.trainer_ranks", str(path)], cwd=ROOT, env=environment, stderr=log
    )
    try:
        assert agent.wait(GUARD_S) == 0, (root / "log").read_text()[-5000:]
    finally:
        agent.terminate()  # which ends its ranks
        agent.wait()
        log.close()


def main() -> int:
    ranks = join("cpu", GUARD_S)
    code = 1
    try:
        if ranks.rank > 0:
            code = run_follower(ranks)
        else:
            path = Path(sys.argv[1])
            for job in msgspec.msgpack.decode(path.read_bytes(), type=list[Job]):
                do(job, path.parent / job.name, ranks)
            code = 0
    finally:
        ranks.exit_all(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
