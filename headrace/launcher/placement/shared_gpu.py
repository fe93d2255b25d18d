"""One GPU for learner and engine: the share that the learner needs, by the estimates, and the check of a share.

The learner may take `learner.memory_fraction` of the GPU's memory, the engine has the rest
(headrace/common/hardware/placement.py). For a model whose size is unknown, a configured share is accepted unchecked.
"""

import math

from headrace.common.config import RunConfig
from headrace.common.hardware.gpus import Gpu
from headrace.common.hardware.placement import engine_static_bytes
from headrace.common.preflight.recipe import UnavailableHere
from headrace.launcher.estimates.device_memory import (
    BYTES,
    TYPICAL_PROMPT_TOKENS,
    kv_bytes_per_token,
    learner_bytes,
)
from headrace.launcher.estimates.model_size import Shape, shape_of

SLACK = 1.1
"""The proposed share is the estimate plus a tenth, for fragmentation."""
GIB = 1 << 30


def propose_split(config: RunConfig, gpu: Gpu) -> str:
    """A note with the share that would fit, or why none can be proposed. Raises `UnavailableHere` if nothing fits."""
    shape = _shape(config)
    if shape is None or not gpu.total_bytes:
        return "no share can be proposed, since the model's shape or the GPU's memory is not known here"
    needed = _learner_bytes(shape, config)
    fraction = math.ceil(100 * needed * SLACK / gpu.total_bytes) / 100
    left = engine_static_bytes(gpu.total_bytes, fraction, config.generation.engine.max_running_requests)
    if left < (least := _least_engine_bytes(shape, config)):
        raise UnavailableHere(
            f"GPU {gpu.name} has {_gib(gpu.total_bytes)}, and learner and engine do not fit it together: the learner "
            f"needs {_gib(needed)} by estimate, and an engine would have {_gib(max(0, left))} of the {_gib(least)} "
            "that it needs at least; expected a second GPU, a smaller model or less "
            "learner.micro_batch_tokens"
        )
    return f"learner.memory_fraction={fraction:.2f} is proposed, for {_gib(needed)} by estimate"


def check_split(config: RunConfig, gpu: Gpu) -> None:
    """Raises `ValueError` if learner or engine cannot work with the configured share."""
    fraction, engine = config.learner.memory_fraction, config.generation.engine
    assert fraction is not None
    if engine.memory_fraction is not None:
        raise ValueError(
            f"generation.engine.memory_fraction {engine.memory_fraction}: on a GPU that it shares the engine has what "
            f"learner.memory_fraction {fraction} leaves; expected one of the two settings"
        )
    if not gpu.total_bytes:
        raise UnavailableHere(
            f"the memory of GPU {gpu.name} is not known: sharing it needs the driver's nvidia-smi on the PATH"
        )
    left = engine_static_bytes(gpu.total_bytes, fraction, engine.max_running_requests)
    shape = _shape(config)
    least = 0 if shape is None else _least_engine_bytes(shape, config)
    if left <= least:
        raise UnavailableHere(
            f"learner.memory_fraction {fraction} leaves {_gib(max(0, left))} of GPU {gpu.name} for the engine's "
            f"weights and KV cache, which need {_gib(least)} at least; expected a smaller fraction, or a second GPU"
        )
    if shape is not None and (needed := _learner_bytes(shape, config)) > fraction * gpu.total_bytes:
        raise UnavailableHere(
            f"learner.memory_fraction {fraction} of GPU {gpu.name} is {_gib(int(fraction * gpu.total_bytes))}, and the "
            f"learner needs {_gib(needed)} by estimate; expected a larger fraction, or a second GPU"
        )


def _shape(config: RunConfig) -> Shape | None:
    try:
        return shape_of(config)
    except ValueError:
        return None


def _learner_bytes(shape: Shape, config: RunConfig) -> int:
    return sum(learner_bytes(shape, config).values())


def _least_engine_bytes(shape: Shape, config: RunConfig) -> int:
    """Bytes of the weights and of the KV cache of one request at full length."""
    size = BYTES[config.model.dtype]
    tokens = TYPICAL_PROMPT_TOKENS + config.sampling.max_new_tokens
    return shape.num_parameters * size + tokens * kv_bytes_per_token(shape, size)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
