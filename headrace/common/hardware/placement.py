"""Which GPUs each service of a run on one machine gets: the learner's ranks first, then the engine of each replica.

Learner and engine share a GPU only where there is no other, and then by an explicit split (`learner.memory_fraction`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from headrace.common.wire.desired_state import MAX_REPLICAS

MIB = 1 << 20
SHARED_PREFILL_TOKENS = 2048
"""Of one prefill of an engine on a shared GPU, which keeps its activations small."""
OUTSIDE_TORCH_BYTES = 1 << 30
"""Of the learner: what CUDA and its libraries take beside torch's own allocations."""
GpuNames = tuple[str, ...]


class Placement(NamedTuple):
    """GPUs by their names in CUDA_VISIBLE_DEVICES; a service without one sees none."""

    learner: GpuNames
    engines: tuple[GpuNames, ...]
    """Of as many replicas as there can be, `generation-0` first."""
    is_shared: bool = False
    """The learner and the only engine are on the same GPU."""


def assign_gpus(gpus: Sequence[str], *, ranks: int, replicas: int, tp_size: int, is_split: bool) -> Placement:
    """`ranks` 0: the learner needs no GPU; `tp_size` 0: an engine needs none. `is_split`: the learner's share of a GPU
    that it has to share is given. Raises `ValueError` with the numbers, and what to change, if there are too few."""
    if is_split and len(gpus) == ranks == tp_size == 1:
        placement = Placement(tuple(gpus), (tuple(gpus),), is_shared=True)
    else:
        placement = Placement(tuple(gpus[:ranks]), _engines(gpus[ranks:], tp_size))
    if len(placement.learner) < ranks or len(placement.engines) < replicas:
        raise ValueError(_too_few(gpus, ranks, replicas, tp_size, len(placement.engines)))
    return placement


def _engines(gpus: Sequence[str], tp_size: int) -> tuple[GpuNames, ...]:
    if tp_size == 0:
        return ((),) * MAX_REPLICAS
    firsts = range(0, len(gpus) - tp_size + 1, tp_size)
    return tuple(tuple(gpus[first : first + tp_size]) for first in firsts)[:MAX_REPLICAS]


def _too_few(gpus: Sequence[str], ranks: int, replicas: int, tp_size: int, max_replicas: int) -> str:
    names = f" ({', '.join(gpus)})" if gpus else ""
    seen = f"{len(gpus)} GPU{' is' if len(gpus) == 1 else 's are'} visible{names}"
    engines = f"{replicas} replica{'s' * (replicas != 1)} of generation.engine.tp_size {tp_size}"
    parts = [f"learner.num_ranks {ranks}"] * (ranks > 0) + [engines] * (replicas * tp_size > 0)
    needed = f"{' and '.join(parts)} need {ranks + replicas * tp_size}"
    if not gpus:
        return f"{seen}, and {needed}; expected device: cpu or auto, or GPUs that CUDA_VISIBLE_DEVICES does not hide"
    if len(gpus) >= ranks and max_replicas > 0:
        step = f"generation.replicas {max_replicas} at most (headrace up --replicas {max_replicas})"
    elif len(gpus) == ranks == tp_size == 1:
        step = "generation.replicas 1 and learner.memory_fraction, the learner's share of the one GPU (headrace check)"
    else:
        step = "fewer learner.num_ranks, a smaller generation.engine.tp_size, replicas elsewhere (--replicas 0)"
    return f"{seen}, and {needed}; expected {step}, or more GPUs"


def engine_static_bytes(total_bytes: int, learner_fraction: float, max_running_requests: int) -> int:
    """Of a GPU that engine and learner share: what is left for the engine's weights and KV cache.

    Beyond these SGLang takes, by its own reckoning (sglang 0.5.23, srt/arg_groups/memory_hook.py), 512 MiB, 1.5 MiB a
    token of a prefill and 2 MiB a request of the largest CUDA graph.
    """
    beside = 512 * MIB + SHARED_PREFILL_TOKENS * 3 * MIB // 2 + max_running_requests * 2 * MIB
    return int(total_bytes * (1 - learner_fraction)) - beside - OUTSIDE_TORCH_BYTES
