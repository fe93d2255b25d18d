"""Every setting of a run, by section. Defaults suit one GPU box; a recipe holds only what differs.

Units are in the names. Whatever can be wrong without starting anything is refused here, in one line that names
the value and what was expected.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

import headrace
from headrace.common.config.actor import ActorConfig
from headrace.common.config.engine_args import check_extra_args
from headrace.common.config.section import Section
from headrace.common.wire.desired_state import MAX_REPLICAS
from headrace.common.wire.structs import MAX_STOP_CHARS, MAX_STOPS

AUTO_DEVICE = (
    "auto: CUDA where a GPU is visible and what uses it is installed, a CUDA build of torch and SGLang's kernels."
)
DType = Literal["float32", "bfloat16"]


class ModelConfig(Section):
    path: str = Field(
        description="Folder in Hugging Face format, or a hub name: the policy to start from. headrace/demo/policy is "
        "the demo's, which comes with the package."
    )
    revision: str | None = Field(
        None, min_length=1, description="Of a model on the hub: a branch, tag or commit; default: the newest."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that comes with the model, where transformers and SGLang have none for it: "
        "with your rights, in the learner, the engines and `headrace check`. Name a commit as revision.",
    )
    dtype: DType = Field("bfloat16", description="Of the published weights and the learner's forward pass.")
    chat_template: str | None = Field(
        None,
        description="File of a Jinja chat template; default: the model's own. policy/ is saved with it.",
    )
    chat_template_settings: dict[str, Any] = Field(
        {}, description="What the chat template reads besides the messages, such as enable_thinking: false of Qwen3."
    )

    @field_validator("path")
    @classmethod
    def _of_the_package(cls, path: str) -> str:
        """`headrace/demo/policy` is the installed package's folder where the working directory has none."""
        packaged = Path(headrace.__file__).parents[1] / path
        is_packaged = path.startswith("headrace/") and not Path(path).exists() and packaged.is_dir()
        return str(packaged) if is_packaged else path


class TaskConfig(Section):
    name: str = Field(description="A built-in task (arithmetic, gsm8k) or 'package.module:Class'.")
    settings: dict[str, Any] = Field({}, description="Keyword arguments of the task.")
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="System message put before each of the task's prompts. Refused where the model's chat template "
        "takes none, or the task has its own.",
    )


FULL_DISTRIBUTION = "the engine would sample from another distribution than the learner computes"
NOT_OFFERED = {
    **{f"sampling.{name}": FULL_DISTRIBUTION for name in ("top_p", "top_k", "min_p", "logit_bias")},
    **{f"sampling.{kind}_penalty": FULL_DISTRIBUTION for kind in ("repetition", "frequency", "presence")},
    "sampling.min_new_tokens": "it masks the end tokens, so that "
    + FULL_DISTRIBUTION
    + "; a reward can ask for length",
}
"""What others have and this cannot have, with the reason."""


class SamplingConfig(Section):
    """top_p stays 1 and top_k off, and nothing masks a token: the engine's log-probabilities are of the full
    distribution, as the learner's are."""

    temperature: float = Field(
        1.0, ge=1e-3, le=1e3, description="Sampling temperature; the learner divides its logits by it."
    )
    max_new_tokens: int = Field(1024, ge=1, description="Longest completion.")
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] = Field(
        [],
        max_length=MAX_STOPS,
        description="Texts that end a completion, besides the model's end tokens. The token that completes one is the "
        "last that is trained on, and of the text that the reward reads.",
    )


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(1e-6, gt=0, description="Highest learning rate.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="After the warm-up: constant, or down to lr * lr_final_fraction at the last step, in a line or by "
        "half a cosine.",
    )
    lr_final_fraction: float = Field(0.0, ge=0, le=1, description="Where 'linear' and 'cosine' end, as a share of lr.")
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of steps over which lr rises linearly.")
    warmup_steps: int = Field(0, ge=0, description="The same in steps; give one of the two.")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")

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
        description="What admission bounds the mean staleness by, fractions allowed; default, and at most: "
        "max_staleness. The lower, the fresher what is trained, and the longer the learner waits for it.",
    )
    stale_policy: Literal["drop", "train"] = Field(
        "drop",
        description="What happens to a group above max_staleness at packing. With a heavy tail of lengths, dropping"
        " hits the long ones.",
    )
    micro_batch_tokens: int = Field(
        10240,
        ge=16,
        description="Tokens of one forward pass as attention sees them: with padding and each completion's prompt. "
        "A CPU is fastest at 1,024 to 2,048, the less the more completions differ in length.",
    )
    logprob_chunk_tokens: int | None = Field(
        None, ge=1, description="Tokens whose logits exist at one time; default: 4,096 on CUDA, 512 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Of the GPU's memory, what torch may take in the learner; default: all. Asked for where learner "
        "and engine share one GPU, of which the engine has the rest; `headrace check` proposes a value.",
    )
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass.")
    num_threads: int | None = Field(None, ge=1, description="Torch's CPU threads; default: torch's own choice.")
    checkpoint_interval_steps: int = Field(20, ge=1, description="Steps between checkpoints.")
    starvation_deadline_s: float = Field(
        1800.0, gt=0, description="The learner exits (code 4), with the reason, after this long without a step."
    )
    ranks: int = Field(
        1, ge=1, description="Processes on the learner's machine, one a device. Under torchrun that says how many."
    )
    rank_deadline_s: float = Field(
        300.0,
        ge=1,
        description="On several ranks: one that waits this long for another ends, and with it the job. More "
        "than a forward and backward pass can take; checkpoints are written beside them.",
    )
    host: str = Field("127.0.0.1", description="Address the learner listens on.")
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")

    def chunk_tokens(self, device_type: str) -> int:
        """`logprob_chunk_tokens` on a learner's device, "cuda" or "cpu"."""
        return self.logprob_chunk_tokens or (4096 if device_type == "cuda" else 512)

    @property
    def max_outstanding_groups(self) -> int:
        """Admission: open tickets + groups not yet consumed never exceed this."""
        asked = self.max_staleness if self.max_mean_staleness is None else self.max_mean_staleness
        return math.floor((min(asked, self.max_staleness) + 1) * self.groups_per_step + 1e-9)  # 1.15 * 100 < 115


class EngineConfig(Section):
    """The SGLang server of each replica."""

    url: str | None = Field(None, description="Attach to a running SGLang server instead of starting one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    tp_size: int = Field(
        1,
        ge=1,
        description="Tensor parallelism: GPUs of one engine, each with a part of every weight and of the cache.",
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Longest sequence, prompt included; default: what the model's config.json says."
    )
    max_running_requests: int = Field(256, ge=1, description="Completions decoded at one time.")
    max_total_tokens: int | None = Field(
        None, ge=256, description="Tokens in the KV cache; default: what fits, 65,536 on a CPU."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="For weights and KV cache, of the memory that is free on the device when the engine starts; "
        "default: SGLang's choice (0.7 to 0.9 of a GPU), 0.3 on a CPU.",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of the engine's kernels.")
    startup_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Longest wait for the engine to answer. On a GPU its first start on a machine compiles kernels, "
        "about half a minute of a core for each.",
    )
    silence_timeout_s: float = Field(
        60.0,
        ge=2,
        description="An engine without a sign of life for so long is killed and started again. One on a CPU that is "
        "busy computing is given request_timeout_s; on a GPU this must exceed the longest prefill.",
    )
    swap_mode: Literal["retract", "in_place"] = Field(
        "retract",
        description="What becomes of the KV cache of what is in flight when weights are swapped. retract: computed "
        "again, and log-probabilities stay exact. in_place: kept; no engine time is lost (retract: 21 % at a version "
        "a second, benchmarks.swap_modes; the demo's runs as a whole: 10 %, and 4 % of their time), but tokens after "
        "a swap match no version exactly (up to 0.4 from the learner's log-probabilities, else 2e-5), and the engine "
        "must have no overlap schedule, radix cache or tensor parallelism.",
    )
    extra_args: list[str] = Field(
        [], description="Further arguments of sglang.launch_server, but for what a setting is for."
    )

    @model_validator(mode="after")
    def _check_extra_args(self) -> Self:
        check_extra_args(self.extra_args, self.swap_mode, self.tp_size)
        return self


class GenerationConfig(Section):
    replicas: int = Field(
        1,
        ge=0,
        le=MAX_REPLICAS,
        description="Replicas that `headrace up` keeps as long as `headrace scale` has ordered no other number.",
    )
    autoscale: bool = Field(
        False, description="`headrace up` follows the learner's advice as long as nobody has ordered a number."
    )
    max_replicas: int = Field(8, ge=1, le=MAX_REPLICAS, description="More are never advised.")
    max_groups_in_flight: int = Field(32, ge=1, description="Training groups that a replica works on at one time.")
    max_eval_groups_in_flight: int = Field(
        32,
        ge=1,
        description="Evaluation groups, in slots of their own, if they are of actor.group_size completions; of smaller "
        "ones so many more that they are as many completions.",
    )
    max_attempts: int = Field(3, ge=1, description="Failed attempts before a ticket is dead.")
    lease_s: float = Field(30.0, gt=0, description="A ticket whose replica is silent this long may be claimed.")
    request_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Longest wait for the completions of a ticket, of up to 4,096 tokens (longer ones in proportion), "
        "while the engine answers no other either, and four times that in any case; and for the weights that a ticket "
        "asks for.",
    )
    max_swapping_share: float = Field(
        0.5, gt=0, le=1, description="Of the replicas, paused for new weights at the same time; one is always let."
    )
    reward_workers: int = Field(1, ge=1, description="Processes that score completions, per replica.")
    reward_deadline_s: float = Field(10.0, gt=0, description="Longest time to score one group.")
    reward_memory_bytes: int = Field(4 << 30, ge=1 << 26, description="Address space of one reward process.")
    host: str = Field("127.0.0.1", description="Address a replica listens on.")
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    engine: EngineConfig = EngineConfig()


class EvaluationConfig(Section):
    interval_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: before and after the run only.")
    num_prompts: int = Field(256, ge=1, description="Held-out prompts, the first of the split.")
    num_samples: int = Field(2, ge=1, description="Completions per held-out prompt; pass@k is told up to this k.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=1e3,
        description="Of evaluations; default: the sampling temperature. 0: greedy, where one sample says it all.",
    )


class ControlConfig(Section):
    """The run's front door: REST, the live page, metrics."""

    host: str = Field("127.0.0.1", description="Address control listens on.")
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    protect_reads: bool = Field(
        False, description="Reading needs the run's token as well; changing something needs it in any case."
    )


class RunConfig(Section):
    model: ModelConfig
    task: TaskConfig
    seed: int = Field(0, ge=0, description="Order of the prompts, and torch's random state.")
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    control: ControlConfig = ControlConfig()
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="Also write every row of metrics there; `pip install` them first."
    )
    redis_url: str | None = Field(None, description="An existing Redis; default: `headrace up` starts one.")
    durability: Literal["strict", "relaxed"] = Field(
        "strict", description="strict refuses a Redis that may lose writes (appendonly, appendfsync, eviction)."
    )

    @property
    def num_eval_slots(self) -> int:
        """Evaluation groups that a replica works on at one time."""
        num_completions = self.generation.max_eval_groups_in_flight * self.actor.group_size
        return max(1, num_completions // self.evaluation.num_samples)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        groups, tokens = self.learner.groups_per_step, self.learner.micro_batch_tokens
        if self.actor.mini_batches > groups:
            raise ValueError(
                f"actor.mini_batches {self.actor.mini_batches} is more than learner.groups_per_step {groups}"
            )
        if self.sampling.max_new_tokens > tokens:
            raise ValueError(
                f"sampling.max_new_tokens {self.sampling.max_new_tokens} does not fit "
                f"learner.micro_batch_tokens {tokens}"
            )
        if self.optimizer.warmup_steps >= self.learner.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not less than learner.steps "
                f"{self.learner.steps}: the rate would never reach optimizer.lr"
            )
        if self.actor.overlong_tokens > self.sampling.max_new_tokens:
            raise ValueError(
                f"actor.overlong_tokens {self.actor.overlong_tokens} is more than "
                f"sampling.max_new_tokens {self.sampling.max_new_tokens}"
            )
        if self.generation.autoscale and self.generation.replicas > self.generation.max_replicas:
            raise ValueError(
                f"generation.replicas {self.generation.replicas} is more than "
                f"generation.max_replicas {self.generation.max_replicas}"
            )
        in_flight = max(self.actor.group_size, self.evaluation.num_samples)
        if in_flight > self.generation.engine.max_running_requests:
            raise ValueError(
                f"a group of {in_flight} completions does not fit "
                f"generation.engine.max_running_requests {self.generation.engine.max_running_requests}"
            )
        return self
