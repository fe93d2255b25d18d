"""Estimated time to the first step and of a step, from a run's multiplications and this machine's speed.

A CPU's speed is measured (a tenth of a second, one thread); for a GPU an H100's is assumed. Real layers reach half of
it, or 0.35 on a GPU. Completions are assumed to have half of sampling.max_new_tokens. An error of a factor of two is
usual, and a model so small that call overhead dominates takes longer.
"""

import time
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.launcher.estimates.model_size import Shape

H100_FLOPS = {"float32": 4e14, "bfloat16": 9.9e14}
"""Dense operations per second; float32 with TF32."""
EFFICIENCY = {"cpu": 0.5, "cuda": 0.35}
DECODING_SHARE = {"cpu": 0.5, "cuda": 0.1}
"""Share of that speed that decoding reaches, because it reads all weights for each token of the batch."""
BFLOAT16_SLOWDOWN = 5.0
"""How much slower a CPU without bfloat16 units multiplies bfloat16."""
START_S = {"cpu": 25.0, "cuda": 120.0}
"""Time until engine and learner are ready; the first start on a GPU takes minutes more, to compile kernels."""
LONG_S = 600.0
SIZE = 512


class Speed(NamedTuple):
    """Multiplications and additions per second that real layers reach."""

    training: float
    decoding: float


class Times(NamedTuple):
    """Durations in seconds; generation and training run concurrently, so the longer one is a step's."""

    evaluation: float
    generation: float
    training: float
    start: float

    @property
    def step(self) -> float:
        return max(self.generation, self.training)

    @property
    def first_step(self) -> float:
        return self.start + self.evaluation + self.generation + self.training


def estimate(shape: Shape, config: RunConfig, prompt_tokens: int, learner: Speed, engine: Speed, start: float) -> Times:
    """`prompt_tokens`: prompt tokens computed per group. `engine`: the speed of all replicas together."""
    tokens = config.sampling.max_new_tokens / 2
    forward = 2 * shape.num_active_parameters
    sequences = config.learner.groups_per_step * config.actor.group_size
    evaluated = config.evaluation.num_prompts * config.evaluation.completions_per_prompt
    trained = sequences * tokens + config.learner.groups_per_step * prompt_tokens
    passes = 3 + config.learner.gradient_checkpointing + (1 - 1 / config.actor.num_mini_batches)
    passes += config.actor.kl_coef > 0
    return Times(
        evaluation=evaluated * tokens * forward / engine.decoding,
        generation=sequences * tokens * forward / engine.decoding,
        training=trained * forward * passes / learner.training,
        start=start,
    )


def duration_warnings(times: Times, config: RunConfig) -> list[str]:
    """Notes on sizes that take too long on this machine."""
    notes = []
    evaluation = config.evaluation
    if times.evaluation > LONG_S:
        notes.append(
            f"an evaluation of {evaluation.num_prompts:,} prompts x {evaluation.completions_per_prompt} completions "
            f"takes about {format_seconds(times.evaluation)} here, and the first one precedes the first step; "
            "expected fewer evaluation.num_prompts, evaluation.completions_per_prompt or sampling.max_new_tokens"
        )
    if times.step > LONG_S:
        which = "training" if times.training > times.generation else "generating"
        notes.append(
            f"a step takes about {format_seconds(times.step)} here, which is {which} "
            f"{config.learner.groups_per_step:,} groups x {config.actor.group_size} completions; "
            "expected fewer learner.groups_per_step, a smaller actor.group_size or sampling.max_new_tokens, or a "
            "faster machine"
        )
    return notes


def cpu_speed(config: RunConfig, flops: float, has_units: bool, num_cores: int) -> tuple[Speed, Speed]:
    """The speeds of the learner and of all engines together. `flops`: one thread's speed in float32."""
    slow = BFLOAT16_SLOWDOWN if config.model.dtype == "bfloat16" and not has_units else 1.0
    threads = min(config.learner.num_threads or num_cores, num_cores)
    engines = min(config.generation.replicas * config.generation.engine.num_threads, num_cores)
    return _speed("cpu", flops * threads), _speed("cpu", flops * max(1, engines) / slow)


def gpu_speed(config: RunConfig) -> tuple[Speed, Speed]:
    flops = H100_FLOPS[config.model.dtype]
    engines = max(1, config.generation.replicas) * config.generation.engine.tp_size
    return _speed("cuda", flops * config.learner.num_ranks), _speed("cuda", flops * engines)


def _speed(device: str, flops: float) -> Speed:
    return Speed(flops * EFFICIENCY[device], flops * EFFICIENCY[device] * DECODING_SHARE[device])


def measure_flops() -> float:
    """The float32 speed of this process's threads; `OPENBLAS_NUM_THREADS` sets their number."""
    import numpy as np

    left = np.ones((SIZE, SIZE), np.float32)
    right, out = np.full((SIZE, SIZE), 0.5, np.float32), np.empty((SIZE, SIZE), np.float32)
    np.matmul(left, right, out=out)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        best = max(best, 2 * SIZE**3 / (time.perf_counter() - started))
    return best


def format_seconds(seconds: float) -> str:
    """A duration as text, such as 12 s, 5 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
