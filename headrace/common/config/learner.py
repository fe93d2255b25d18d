"""How it is trained: the optimizer, and the learner's process."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.section import AUTO_DEVICE, Section


class OptimizerConfig(Section):
    """AdamW on float32 master weights."""

    lr: float = Field(1e-6, gt=0, description="Highest learning rate.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Schedule after the warm-up: constant, or a decay to lr * lr_final_fraction at the last step, "
        "linear or by half a cosine.",
    )
    lr_final_fraction: float = Field(
        0.0, ge=0, le=1, description="Final rate of 'linear' and 'cosine', as a share of lr."
    )
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of steps over which lr rises linearly.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which lr rises linearly; give this or warmup_fraction.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Term added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm that gradients are clipped to.")

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_fraction and self.warmup_steps:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction:g} and warmup_steps {self.warmup_steps} are both given: "
                "expected one of them"
            )
        return self


class LearnerConfig(Section):
    steps: int = Field(1000, ge=1, description="Steps of the run: one batch and one weight version each.")
    groups_per_step: int = Field(32, ge=1, description="Groups in a batch.")
    max_staleness: int = Field(2, ge=0, description="Highest staleness, in steps, that is trained on.")
    max_mean_staleness: float | None = Field(
        None,
        ge=0,
        description="Upper bound on mean staleness, enforced by admission; may be fractional. Default and maximum: "
        "max_staleness. A lower bound means fresher groups and a learner that waits longer for them.",
    )
    stale_policy: Literal["reissue", "train"] = Field(
        "reissue",
        description="Treatment of a group above max_staleness at packing. reissue: it is dropped, and its prompt is "
        "sampled once more; with a heavy tail of lengths this drops the long completions. train: it is trained on.",
    )
    micro_batch_tokens: int = Field(
        10240,
        ge=16,
        description="Token budget of one forward pass, counted with padding and each completion's prompt. A CPU is "
        "fastest at 1,024 to 2,048; fewer if completions differ much in length.",
    )
    logprob_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Chunk size in tokens for computing logits; smaller uses less memory. Default: 4,096 on CUDA, "
        "512 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the GPU's memory that the learner may take; default: all. Required if learner and engine "
        "share one GPU; the engine has the rest. `headrace check` proposes a value.",
    )
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass.")
    num_threads: int | None = Field(None, ge=1, description="Torch's CPU threads; default: torch's own choice.")
    checkpoint_interval_steps: int = Field(20, ge=1, description="Steps between checkpoints.")
    starvation_deadline_s: float = Field(
        1800.0, gt=0, description="The learner exits (code 4), with the reason, after this long without a step."
    )
    num_ranks: int = Field(
        1,
        ge=1,
        description="Number of processes of the learner, one per device, on one machine. Under torchrun, torchrun's "
        "number applies.",
    )
    rank_deadline_s: float = Field(
        300.0,
        ge=1,
        description="Longest wait of a rank for another; then the job ends. Must exceed a forward and backward pass.",
    )
    host: str = Field("127.0.0.1", description="Address the learner listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")

    def chunk_tokens(self, device_type: str) -> int:
        """`logprob_chunk_tokens` on a learner's device, "cuda" or "cpu"."""
        return self.logprob_chunk_tokens or (4096 if device_type == "cuda" else 512)

    @property
    def max_outstanding_groups(self) -> int:
        """Admission: open tickets + groups not yet consumed never exceed this."""
        asked = self.max_staleness if self.max_mean_staleness is None else self.max_mean_staleness
        return math.floor((min(asked, self.max_staleness) + 1) * self.groups_per_step + 1e-9)  # 1.15 * 100 < 115
