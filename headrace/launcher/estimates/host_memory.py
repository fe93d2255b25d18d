"""Estimated memory and disk of a machine: every process of a run, its share of /dev/shm, the run's folder.

A process's memory is its resident memory (anonymous, and mapped libraries), without what it maps of /dev/shm. The
figures without a model are measured (`tests/whole/test_end_to_end.py` compares the sums with a real run). They are
medians of three machines, up to 15 % apart, because Linux maps more of a library where more is cached. A process's
share of the model follows from the code. On a GPU the CUDA libraries of learner and scheduler add 2 to 3 GiB each, an
estimate that was not measured.
"""

import shutil
from pathlib import Path

from headrace.common.config import RunConfig
from headrace.launcher.estimates.device_memory import BYTES, MIB, Rows
from headrace.launcher.estimates.model_size import Shape

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
LAUNCHER_BYTES, CONTROL_BYTES, REDIS_BYTES = 85 * MIB, 82 * MIB, 17 * MIB
LEARNER_BYTES = 512 * MIB
REPLICA_BYTES, REWARD_WORKER_BYTES = 97 * MIB, 33 * MIB
EPISODES_BYTES, ENVIRONMENT_WORKER_BYTES = 39 * MIB, 53 * MIB
"""Of a task with `rollout`: what the replica has for its gateway, and a worker without the task's own libraries."""
SERVER_BYTES, SCHEDULER_BYTES, DETOKENIZER_BYTES = 680 * MIB, 609 * MIB, 493 * MIB
"""SGLang's three processes; the server starts the other two."""
TOKEN_BYTES = 2300
"""Memory per token of the vocabulary in each process with a tokenizer: the learner and SGLang's three."""
WEIGHT_COPIES = 2
"""Copies in the learner's host memory: the version published last, and the one being published."""
STATE_BYTES = 12
"""Bytes of a parameter's master and moments, in a checkpoint and in the copy that it is written from."""
HELD_VERSIONS, KEPT_DELTAS = 2, 0.5
"""On a replica's own machine: the served and the next version; earlier deltas, as a share of the model's bytes."""
SHARED_VERSIONS = 3
"""Versions in memory that learner and replicas of one machine share: the newest two, and the one being written."""
NUM_CHECKPOINTS = 3
"""Two kept, and one being written."""
ANCHORS, MAX_DELTAS = 2, 32
"""Weight versions on disk: the anchors that are kept, and the most deltas between two of them."""


def host_rows(
    shape: Shape,
    config: RunConfig,
    learner: int,
    engine: int,
    on_cpu: tuple[bool, bool],
    has_rollout: bool = False,
) -> tuple[Rows, Rows]:
    """Host memory of the run, and of each replica.

    `learner` and `engine`: bytes of their devices; `on_cpu`: whether each of these is in the host's memory.
    `has_rollout`: the task has `rollout` in place of `reward`.
    """
    copies = shape.num_parameters * (WEIGHT_COPIES * BYTES[config.model.dtype] + STATE_BYTES)
    ranks, settings, tokens = config.learner.num_ranks, config.generation, shape.vocab * TOKEN_BYTES
    run = {
        "the learner, with copies of weights and state": ranks * (LEARNER_BYTES + tokens + learner * on_cpu[0])
        + copies,
        "launcher, control and Redis, without the groups that wait": LAUNCHER_BYTES + CONTROL_BYTES + REDIS_BYTES,
    }
    # On the learner's machine a replica takes versions as files; elsewhere it applies deltas, with up to 4 copies.
    largest = shape.vocab * shape.hidden * BYTES[config.model.dtype]
    replica = {"a replica's own process": REPLICA_BYTES + largest}
    if has_rollout:
        replica["a replica's own process"] += EPISODES_BYTES + tokens
        replica["its environment workers, without what the task loads"] = (
            ENVIRONMENT_WORKER_BYTES * config.environment.workers
        )
    else:
        replica["its reward workers"] = REWARD_WORKER_BYTES * settings.reward_workers
    if settings.engine.url is None:
        replica["its engine: the scheduler"] = SCHEDULER_BYTES + tokens + engine * on_cpu[1]
        replica["its engine: server and detokenizer"] = SERVER_BYTES + DETOKENIZER_BYTES + 2 * tokens
    return run, replica


def shared_memory_bytes(shape: Shape, config: RunConfig) -> int:
    """The most bytes that a replica on another machine puts into /dev/shm."""
    return int(weight_bytes(shape, config) * (HELD_VERSIONS + KEPT_DELTAS))


def shared_memory_problem(shape: Shape, config: RunConfig) -> str:
    """Why the weights do not fit into this machine's /dev/shm; empty if they do, or if it is not used.

    A replica does not start without room for two versions (headrace/generation/weights/free_space.py).
    """
    replicas = config.generation.replicas
    if not SHARED_MEMORY.is_dir() or not replicas:
        return ""
    free, versions = shutil.disk_usage(SHARED_MEMORY).free, min(SHARED_VERSIONS, HELD_VERSIONS * replicas)
    needed = versions * weight_bytes(shape, config)
    if needed <= free:
        return ""
    return (
        f"{SHARED_MEMORY} has {free / GIB:.1f} GiB free, and {versions} versions of the weights take "
        f"{needed / GIB:.1f} GiB; expected a larger one (mount -o remount,size=...), or a smaller model"
    )


def disk_rows(shape: Shape, config: RunConfig, share: float) -> Rows:
    """The largest size of a run's folder, without logs, metrics and Redis' file. `share`: of a delta in the model."""
    weights = weight_bytes(shape, config)
    chain = min(1.0, MAX_DELTAS * share)
    return {
        f"checkpoints: {NUM_CHECKPOINTS - 1} kept, one being written": NUM_CHECKPOINTS
        * shape.num_parameters
        * STATE_BYTES,
        "weight versions: two whole ones and deltas, one being written": int(
            weights * (ANCHORS + 1 + (ANCHORS + 1) * chain)
        ),
        "the best policy, the next best, the last": 3 * weights,
    }


def weight_bytes(shape: Shape, config: RunConfig) -> int:
    return shape.num_parameters * BYTES[config.model.dtype]


def machine_memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less; 0 if unknown."""
    found = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            found.append(int(line.split()[1]) * 1024)
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return min([*found, *([int(limit)] if limit.isdecimal() else [])], default=0)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
