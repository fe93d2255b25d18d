"""The settings of training: the optimizer and the learner's processes."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.section import AUTO_DEVICE, Section


class OptimizerConfig(Section):
    """AdamW on float32 master weights."""

    lr: float = Field(1e-6, gt=0, description="Learning rate; with a warm-up or a decay, the highest.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning rate schedule after the warm-up: constant, or a linear or half-cosine decay to lr * "
        "lr_final_fraction at the last step.",
    )
    lr_final_fraction: float = Field(
        0.0, ge=0, le=1, description="Final learning rate of 'linear' and 'cosine', as a share of lr."
    )
    warmup_fraction: float = Field(
        0.0, ge=0, lt=1, description="Length of the linear warm-up, as a share of all steps."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Length of the linear warm-up in steps; set this or warmup_fraction."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay rate of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay rate of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Term added to the denominator for numerical stability.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay coefficient.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Largest norm of the gradient of an update; a larger gradient is scaled down to it."
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_fraction and self.warmup_steps:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction:g} and warmup_steps {self.warmup_steps} are both given: "
                "expected one of them"
            )
        return self


class LearnerConfig(Section):
    steps: int = Field(
        1000, ge=1, description="Number of steps of the run; each trains one batch and publishes one weight version."
    )
    groups_per_step: int = Field(32, ge=1, description="Number of groups in a batch.")
    max_staleness: int = Field(
        2,
        ge=0,
        description="Highest staleness, in steps, of a group that is trained on; 0: no older weights (synchronous).",
    )
    max_mean_staleness: float | None = Field(
        None,
        ge=0,
        description="Upper bound on mean staleness in steps, enforced by admission; may be fractional. Default and "
        "maximum: max_staleness. With a lower bound groups are fresher, and the learner waits longer for them.",
    )
    stale_policy: Literal["reissue", "train"] = Field(
        "reissue",
        description="Treatment of a group above max_staleness at packing. reissue: the group is dropped, and its "
        "prompt is sampled once more; if lengths have a heavy tail, this drops the long completions. train: the group "
        "is trained on.",
    )
    micro_batch_tokens: int = Field(
        10240,
        ge=16,
        description="Token budget of one forward pass, with padding and the prompt of each completion. A CPU is "
        "fastest at 1,024 to 2,048, or less if completions differ much in length.",
    )
    logprob_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Chunk size in tokens for computing logits; a smaller one uses less memory. Default: 4,096 on "
        "CUDA, 512 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest share of the GPU's memory that the learner takes; default: all. Required if learner and "
        "engine share one GPU; the engine has the rest. `headrace check` proposes a value.",
    )
    gradient_checkpointing: bool = Field(
        True, description="Recomputation of activations in the backward pass: less memory, more time."
    )
    num_threads: int | None = Field(None, ge=1, description="Number of torch's CPU threads; default: torch's choice.")
    checkpoint_interval_steps: int = Field(20, ge=1, description="Number of steps between checkpoints.")
    starvation_deadline_s: float = Field(
        1800.0, gt=0, description="Longest time without a step; then the learner exits with code 4 and the reason."
    )
    num_ranks: int = Field(
        1,
        ge=1,
        description="Number of learner processes, one per device, on one machine. Under torchrun, torchrun's number "
        "applies.",
    )
    rank_deadline_s: float = Field(
        300.0,
        ge=1,
        description="Longest wait of a rank for another rank; then the job ends. Must exceed the time of a forward and "
        "backward pass.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address that the learner listens on; 0.0.0.0 if replicas on other machines must reach it.",
    )
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")

    def chunk_tokens(self, device_type: str) -> int:
        """The value of `logprob_chunk_tokens` that applies on a device, "cuda" or "cpu"."""
        return self.logprob_chunk_tokens or (4096 if device_type == "cuda" else 512)

    @property
    def max_outstanding_groups(self) -> int:
        """Admission's bound on open tickets plus groups that are not consumed yet."""
        asked = self.max_staleness if self.max_mean_staleness is None else self.max_mean_staleness
        return math.floor((min(asked, self.max_staleness) + 1) * self.groups_per_step + 1e-9)  # 1.15 * 100 < 115
