"""The assignment of one machine's GPUs to a run's services: first the learner's ranks, then each replica's engine.

Learner and engine share a GPU only if there is no other, and only with an explicit split (`learner.memory_fraction`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from headrace.common.wire.desired_state import MAX_REPLICAS

MIB = 1 << 20
SHARED_PREFILL_TOKENS = 2048
"""Tokens of one prefill of an engine on a shared GPU; a small prefill has small activations."""
OUTSIDE_TORCH_BYTES = 1 << 30
"""Memory of the learner that CUDA and its libraries take in addition to torch's allocations."""
GpuNames = tuple[str, ...]


class Placement(NamedTuple):
    """GPUs by their names in CUDA_VISIBLE_DEVICES; a service without a GPU sees none."""

    learner: GpuNames
    engines: tuple[GpuNames, ...]
    """The GPUs of each possible replica, `generation-0` first."""
    is_shared: bool = False
    """Whether the learner and the only engine are on the same GPU."""


def assign_gpus(gpus: Sequence[str], *, ranks: int, replicas: int, tp_size: int, is_split: bool) -> Placement:
    """With `ranks` 0 the learner needs no GPU, with `tp_size` 0 an engine needs none.

    `is_split`: the learner's share of a GPU is configured, so that it can share one. Raises `ValueError` with the
    numbers, and what to change, if there are too few GPUs.
    """
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
    """The bytes left for the engine's weights and KV cache on a GPU that learner and engine share.

    In addition SGLang reserves (sglang 0.5.23, srt/arg_groups/memory_hook.py) 512 MiB, 1.5 MiB per token of a prefill
    and 2 MiB per request of the largest CUDA graph.
    """
    beside = 512 * MIB + SHARED_PREFILL_TOKENS * 3 * MIB // 2 + max_running_requests * 2 * MIB
    return int(total_bytes * (1 - learner_fraction)) - beside - OUTSIDE_TORCH_BYTES
