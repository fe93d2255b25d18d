"""How completions are generated: the replicas and their engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.engine_args import check_extra_args
from headrace.common.config.section import AUTO_DEVICE, Section
from headrace.common.wire.desired_state import MAX_REPLICAS


class EngineConfig(Section):
    """The SGLang server of each replica."""

    url: str | None = Field(None, description="Attach to a running SGLang server instead of starting one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    tp_size: int = Field(
        1,
        ge=1,
        description="Tensor parallelism: number of GPUs of one engine.",
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Longest sequence, prompt included; default: the model's own (config.json)."
    )
    max_running_requests: int = Field(256, ge=1, description="Completions decoded at one time.")
    max_total_tokens: int | None = Field(
        None, ge=256, description="Tokens in the KV cache; default: what fits, 65,536 on a CPU."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the free device memory for weights and KV cache, measured when the engine starts; "
        "default: SGLang's choice (0.7 to 0.9 of a GPU), 0.3 on a CPU.",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of the engine's kernels.")
    startup_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Longest wait for the engine to answer after its start. On a GPU the first start on a machine "
        "compiles kernels, about half a minute of a core for each.",
    )
    liveness_timeout_s: float = Field(
        60.0,
        ge=2,
        description="Time without a sign of life after which an engine is killed and started again. An engine on a CPU "
        "that is busy computing is given completion_timeout_s; on a GPU this must exceed the longest prefill.",
    )
    swap_mode: Literal["retract", "in_place"] = Field(
        "retract",
        description="KV cache of requests in flight when weights are swapped. retract: it is computed again, and "
        "log-probabilities stay exact. in_place: it is kept, which saves engine time (docs/swap-modes.md), but tokens "
        "after a swap match no version exactly, and the engine must have no overlap schedule, radix cache or tensor "
        "parallelism.",
    )
    extra_args: list[str] = Field(
        [], description="Further arguments of sglang.launch_server; those that a setting covers are refused."
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
        description="Number of replicas that `headrace up` keeps, unless `headrace scale` has set a target.",
    )
    autoscale: bool = Field(False, description="Let `headrace up` follow the learner's advice, unless a target is set.")
    max_replicas: int = Field(8, ge=1, le=MAX_REPLICAS, description="Upper bound of the advice.")
    max_groups_in_flight: int = Field(32, ge=1, description="Training groups that a replica works on at one time.")
    max_eval_groups_in_flight: int = Field(
        32,
        ge=1,
        description="Evaluation groups that a replica works on at one time, beside training groups, if they have "
        "actor.group_size completions; proportionally more if they are smaller.",
    )
    max_attempts: int = Field(3, ge=1, description="Failed attempts after which a ticket becomes a dead letter.")
    ticket_lease_s: float = Field(
        30.0,
        gt=0,
        description="Lease duration: a ticket whose lease is not renewed for this long may be claimed by another "
        "replica (checked every third of it).",
    )
    completion_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Longest wait for the completions of a ticket while the engine answers no other either, and four "
        "times that in any case; for up to 4,096 tokens, in proportion for longer completions.",
    )
    weights_timeout_s: float = Field(
        600.0, gt=0, description="Longest wait for the weight version that a ticket asks for; then it is handed back."
    )
    max_concurrent_swap_share: float = Field(
        0.5, gt=0, le=1, description="Maximum share of replicas that swap weights at the same time; one always may."
    )
    reward_workers: int = Field(1, ge=1, description="Number of processes per replica that score completions.")
    reward_deadline_s: float = Field(10.0, gt=0, description="Longest time to score one group, in seconds.")
    reward_memory_bytes: int = Field(4 << 30, ge=1 << 26, description="Largest address space of one reward process.")
    host: str = Field("127.0.0.1", description="Address a replica listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")
    engine: EngineConfig = EngineConfig()
