"""The configuration of a run: its sections, and the combinations that are refused. Defaults suit one GPU machine."""

from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.actor import ActorConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.config.generation import GenerationConfig
from headrace.common.config.learner import LearnerConfig, OptimizerConfig
from headrace.common.config.model import ModelConfig, SamplingConfig, TaskConfig
from headrace.common.config.section import Section


class EvaluationConfig(Section):
    interval_steps: int = Field(
        0, ge=0, description="Number of steps between evaluations; 0: only before and after the run."
    )
    num_prompts: int = Field(256, ge=1, description="Number of held-out prompts, from the beginning of the split.")
    completions_per_prompt: int = Field(
        2, ge=1, description="Number of completions per held-out prompt; pass@k is reported up to this k."
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=1e3,
        description="Sampling temperature for evaluations; default: sampling.temperature. 0: greedy.",
    )


class ControlConfig(Section):
    """The control service: the run's REST interface, live page and metrics."""

    host: str = Field(
        "127.0.0.1", description="Address that the control service listens on; 0.0.0.0 to reach it from other machines."
    )
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")
    require_token_for_reads: bool = Field(
        False, description="Token required for reading too; changes always require the run's token."
    )


class RunConfig(Section):
    model: ModelConfig
    task: TaskConfig
    seed: int = Field(0, ge=0, description="Seed for the order of prompts and torch's random state.")
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    generation: GenerationConfig = GenerationConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    control: ControlConfig = ControlConfig()
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="Experiment trackers that receive every row of metrics; install their packages first."
    )
    redis_url: str | None = Field(None, description="URL of an existing Redis; default: `headrace up` starts one.")
    durability: Literal["strict", "relaxed"] = Field(
        "strict",
        description="Treatment of a Redis that may lose writes (appendonly, appendfsync, eviction). strict: refused. "
        "relaxed: accepted.",
    )

    @property
    def num_eval_slots(self) -> int:
        """Largest number of evaluation groups in flight per replica."""
        num_completions = self.generation.max_eval_groups_in_flight * self.actor.group_size
        return max(1, num_completions // self.evaluation.completions_per_prompt)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        groups, tokens = self.learner.groups_per_step, self.learner.micro_batch_tokens
        if self.actor.num_mini_batches > groups:
            raise ValueError(
                f"actor.num_mini_batches {self.actor.num_mini_batches} is more than learner.groups_per_step {groups}"
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
        in_flight = max(self.actor.group_size, self.evaluation.completions_per_prompt)
        if in_flight > self.generation.engine.max_running_requests:
            raise ValueError(
                f"a group of {in_flight} completions does not fit "
                f"generation.engine.max_running_requests {self.generation.engine.max_running_requests}"
            )
        return self
