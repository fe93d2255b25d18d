"""The whole run: its sections, and the combinations that are impossible. Defaults suit one GPU box."""

from typing import Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.actor import ActorConfig
from headrace.common.config.generation import GenerationConfig
from headrace.common.config.learner import LearnerConfig, OptimizerConfig
from headrace.common.config.model import ModelConfig, SamplingConfig, TaskConfig
from headrace.common.config.section import Section


class EvaluationConfig(Section):
    interval_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: before and after the run only.")
    num_prompts: int = Field(256, ge=1, description="Held-out prompts, the first of the split.")
    completions_per_prompt: int = Field(
        2, ge=1, description="Completions per held-out prompt; pass@k is reported up to this k."
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=1e3,
        description="Sampling temperature for evaluations; default: sampling.temperature. 0: greedy.",
    )


class ControlConfig(Section):
    """The run's front door: REST, the live page, metrics."""

    host: str = Field("127.0.0.1", description="Address control listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0: any free one.")
    require_token_for_reads: bool = Field(
        False, description="Require the run's token for reading too; changing something always requires it."
    )


class RunConfig(Section):
    model: ModelConfig
    task: TaskConfig
    seed: int = Field(0, ge=0, description="Seed of the order of prompts and of torch's random state.")
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    control: ControlConfig = ControlConfig()
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="Experiment trackers that also get every row of metrics; `pip install` them first."
    )
    redis_url: str | None = Field(None, description="URL of an existing Redis; default: `headrace up` starts one.")
    durability: Literal["strict", "relaxed"] = Field(
        "strict",
        description="strict: refuse a Redis that may lose writes (appendonly, appendfsync, eviction). relaxed: accept "
        "it.",
    )

    @property
    def num_eval_slots(self) -> int:
        """Evaluation groups that a replica works on at one time."""
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
