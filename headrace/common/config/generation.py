"""How completions are generated: the replicas and their engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.engine_args import check_extra_args
from headrace.common.config.section import AUTO_DEVICE, Section
from headrace.common.wire.desired_state import MAX_REPLICAS


class EngineConfig(Section):
    """The SGLang server of each replica."""

    url: str | None = Field(None, description="URL of a running SGLang server to use; default: the replica starts one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description=AUTO_DEVICE)
    tp_size: int = Field(
        1,
        ge=1,
        description="Number of GPUs of one engine (tensor parallelism).",
    )
    context_tokens: int | None = Field(
        None,
        ge=16,
        description="Longest sequence in tokens, with the prompt; default: the model's limit (config.json).",
    )
    max_running_requests: int = Field(
        256, ge=1, description="Largest number of completions that are decoded at one time."
    )
    max_total_tokens: int | None = Field(
        None, ge=256, description="Size of the KV cache in tokens; default: what fits in memory; 65,536 on a CPU."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the free device memory, measured when the engine starts, for weights and KV cache; "
        "default: SGLang's choice (0.7 to 0.9 of a GPU); 0.3 on a CPU.",
    )
    num_threads: int = Field(1, ge=1, description="Number of CPU threads of the engine's kernels.")
    startup_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Longest wait for the engine to answer after its start. The first start on a machine with a GPU "
        "compiles kernels, which takes about half a minute of one core each.",
    )
    liveness_timeout_s: float = Field(
        60.0,
        ge=2,
        description="Time without any response after which an engine is killed and restarted. An engine on a CPU that "
        "is busy computing has completion_timeout_s instead; on a GPU this must exceed the longest prefill.",
    )
    swap_mode: Literal["retract", "in_place"] = Field(
        "retract",
        description="Treatment of the KV cache of requests in flight when weights are swapped. retract: it is computed "
        "again, and log-probabilities stay exact. in_place: it is kept, which saves engine time (docs/swap-modes.md), "
        "but tokens after a swap match no version exactly, and the engine must run without overlap schedule, radix "
        "cache and tensor parallelism.",
    )
    prefix_cache: bool | Literal["auto"] = Field(
        "auto",
        description="Whether KV of earlier requests is kept for later ones that begin alike, until the weights change. "
        "auto: on a GPU, and for tasks with `rollout`; off with swap_mode in_place, which cannot have it.",
    )
    extra_args: list[str] = Field(
        [], description="Further arguments of sglang.launch_server; arguments that a setting covers are refused."
    )

    @model_validator(mode="after")
    def _check_extra_args(self) -> Self:
        check_extra_args(self.extra_args, self.swap_mode, self.tp_size)
        return self

    @model_validator(mode="after")
    def _check_prefix_cache(self) -> Self:
        if self.prefix_cache is True and self.swap_mode == "in_place":
            raise ValueError(
                "prefix_cache true: swap_mode in_place would give KV of earlier weights to later requests; expected "
                "prefix_cache auto, or swap_mode retract"
            )
        return self


class GenerationConfig(Section):
    replicas: int = Field(
        1,
        ge=0,
        le=MAX_REPLICAS,
        description="Number of replicas that `headrace up` keeps, unless `headrace scale` has set a target.",
    )
    autoscale: bool = Field(
        False,
        description="Automatic number of replicas, by the learner's advice, unless `headrace scale` has set a target.",
    )
    max_replicas: int = Field(
        8, ge=1, le=MAX_REPLICAS, description="Largest number of replicas that the advice may ask for."
    )
    max_groups_in_flight: int = Field(32, ge=1, description="Largest number of training groups in flight per replica.")
    max_eval_groups_in_flight: int = Field(
        32,
        ge=1,
        description="Largest number of evaluation groups in flight per replica, beside training groups, if they have "
        "actor.group_size completions; proportionally more if they have fewer.",
    )
    max_attempts: int = Field(
        3, ge=1, description="Number of failed attempts after which a ticket becomes a dead letter."
    )
    ticket_lease_s: float = Field(
        30.0,
        gt=0,
        description="Lease duration of a ticket: if the lease is not renewed for this long, another replica may claim "
        "the ticket (checked every third of it).",
    )
    completion_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Longest wait for the completions of a ticket while the engine answers no other ticket either; "
        "four times as long in any case. Applies to up to 4,096 tokens; longer completions have proportionally more.",
    )
    weights_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Longest wait for the weight version that a ticket needs; then the ticket is handed back.",
    )
    max_concurrent_swap_share: float = Field(
        0.5, gt=0, le=1, description="Largest share of replicas that swap weights at the same time; one always may."
    )
    reward_workers: int = Field(1, ge=1, description="Number of reward processes per replica.")
    reward_deadline_s: float = Field(10.0, gt=0, description="Longest time to score one completion.")
    reward_memory_bytes: int = Field(4 << 30, ge=1 << 26, description="Largest address space of one reward process.")
    host: str = Field("127.0.0.1", description="Address that a replica listens on; 0.0.0.0 if others must reach it.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")
    engine: EngineConfig = EngineConfig()
