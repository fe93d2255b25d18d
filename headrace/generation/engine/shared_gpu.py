"""Memory settings of an engine that shares a GPU with the learner.

SGLang's fraction for weights and KV cache refers to the memory that is free when the engine starts (sglang 0.5.23,
srt/mem_cache/kv_cache_configurator.py, `_profile_available_bytes`). By then the learner may have allocated none of its
share, or all of it. So the fraction is computed at each start from the engine's fixed number of bytes.
"""

from headrace.common.config import EngineConfig
from headrace.common.hardware.gpus import visible_gpus
from headrace.common.hardware.placement import SHARED_PREFILL_TOKENS, engine_static_bytes
from headrace.generation.engine.http_calls import EngineError

MIB = 1 << 20


def settings_beside_learner(settings: EngineConfig, learner_fraction: float) -> EngineConfig:
    """Settings for an engine that starts now. Raises `EngineError` if less than the engine's share is free."""
    gpus = visible_gpus()
    if len(gpus) != 1 or not gpus[0].total_bytes:
        raise EngineError(
            f"expected one GPU with memory reported by nvidia-smi, to share with the learner, found {gpus}"
        )
    gpu = gpus[0]
    wanted = engine_static_bytes(gpu.total_bytes, learner_fraction, settings.max_running_requests)
    if not 0 < wanted < gpu.free_bytes:
        raise EngineError(
            f"GPU {gpu.name} has {gpu.free_bytes // MIB} of {gpu.total_bytes // MIB} MiB free, and the engine's share "
            f"beside learner.memory_fraction {learner_fraction} is {wanted // MIB} MiB: another process uses part of it"
        )
    fraction = round(wanted / gpu.free_bytes, 4)
    prefill = ["--chunked-prefill-size", str(SHARED_PREFILL_TOKENS)]
    return settings.model_copy(update={"memory_fraction": fraction, "extra_args": [*prefill, *settings.extra_args]})
