"""What the two sides of a comparison of runs get as input and return: times, and policies saved on the way."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.common.config import RunConfig


class Workload(NamedTuple):
    """Both sides get the recipe; the other fields are for one side or for the evaluation."""

    name: str
    recipe: str
    held_out_problems: int
    save_every: int
    """Number of steps between policies whose accuracy is measured."""
    target: float | None
    """Held-out accuracy that both sides reach; None where the time to it is not measured."""
    goal: float
    """The factor by which Headrace should be faster than TRL."""
    trl_micro_batch: int
    """Completions per forward pass of TRL: the fastest number of those tried."""
    trl_threads: tuple[int, ...]
    """One run with each number; the fastest counts."""


class Outcome(NamedTuple):
    """The result of one run. Times are wall seconds since training began, when engines, models and data are loaded."""

    who: str
    num_threads: int
    """Number of threads of the training process."""
    steps: list[dict[str, Any]]
    """`step` and `wall_s` of each step, in order."""
    policies: dict[int, Path]
    """Folders of policies in Hugging Face format, by step."""

    def s_per_step(self) -> float:
        """Seconds per step once the pipeline is full: without the first fifth of the steps."""
        skipped = max(1, len(self.steps) // 5)
        first, last = self.steps[skipped - 1], self.steps[-1]
        return float((last["wall_s"] - first["wall_s"]) / (last["step"] - first["step"]))

    def s_to(self, target: float, accuracy: dict[int, float]) -> float | None:
        """Seconds until a policy reaches the target, interpolated linearly between the first one that does and the one
        before; None if none does."""
        measured = sorted(step for step in accuracy if step > 0)
        reached = next((place for place, step in enumerate(measured) if accuracy[step] >= target), None)
        if reached is None:
            return None
        around = measured[max(0, reached - 1) : reached + 1]
        wall_s = {row["step"]: float(row["wall_s"]) for row in self.steps}
        return float(np.interp(target, [accuracy[step] for step in around], [wall_s[step] for step in around]))


def spec_of(config: RunConfig) -> dict[str, Any]:
    """TRL's `GRPOConfig` arguments that correspond to the recipe. Raises `ValueError` for settings that TRL does not
    have."""
    actor, optimizer, learner = config.actor, config.optimizer, config.learner
    said = (actor.loss_aggregation, actor.advantage_mean, actor.advantage_std, optimizer.lr_schedule)
    if said != ("sequence_mean", "group", "group", "linear") or optimizer.warmup_fraction or optimizer.warmup_steps:
        raise ValueError(f"the recipe says {said}: expected what TRL is told here")
    low, high = actor.clip_range
    return {
        "seed": config.seed,
        "max_steps": learner.steps * actor.num_mini_batches,
        "num_generations": actor.group_size,
        "max_completion_length": config.sampling.max_new_tokens,
        "temperature": config.sampling.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "importance_sampling_level": actor.importance_sampling_level,
        "loss_type": "grpo",  # the mean over sequences of their token means
        "scale_rewards": "group",
        "epsilon": 1 - low,
        "epsilon_high": high - 1,
        "beta": actor.kl_coef,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": optimizer.lr * optimizer.lr_final_fraction, "power": 1.0},
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "shuffle_dataset": False,
        "gradient_checkpointing": learner.gradient_checkpointing,
        "bf16": config.model.dtype == "bfloat16",
    }
