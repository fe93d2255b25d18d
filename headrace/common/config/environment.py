"""How episodes of several turns are run, for tasks with `rollout`."""

from typing import Literal

from pydantic import Field

from headrace.common.config.section import Section
from headrace.common.wire.structs import MAX_SEGMENTS, MAX_SEQUENCE_TOKENS, MAX_TURNS


class EnvironmentConfig(Section):
    """Episodes of a task with `rollout`; without effect for a task with `reward`."""

    workers: int = Field(1, ge=1, description="Number of environment processes per replica.")
    episodes_per_worker: int = Field(32, ge=1, le=4096, description="Largest number of episodes in one process.")
    memory_bytes: int = Field(4 << 30, ge=1 << 26, description="Largest address space of one environment process.")
    max_turns: int = Field(16, ge=1, le=MAX_TURNS, description="Largest number of replies in an episode.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Largest number of sampled tokens in an episode; default: max_turns * sampling.max_new_tokens.",
    )
    max_context_tokens: int | None = Field(
        None,
        ge=2,
        le=MAX_SEQUENCE_TOKENS,
        description="Longest conversation in tokens; default: the smaller of learner.micro_batch_tokens and the "
        "model's context, of which SGLang uses all but the last 6 tokens.",
    )
    max_segments: int = Field(
        16,
        ge=1,
        le=MAX_SEGMENTS,
        description="Largest number of token sequences of an episode: one, and one more each time that a request does "
        "not continue what was sampled.",
    )
    turn_deadline_s: float = Field(
        120.0, gt=0, description="Longest time of the environment between a reply and its next request, or its end."
    )
    episode_deadline_s: float = Field(
        1200.0,
        gt=0,
        description="Longest time of an episode, with the time that the engine takes; less than "
        "learner.starvation_deadline_s.",
    )
    episode_attempts: int = Field(
        2, ge=1, description="Number of times that an episode is begun before its ticket has failed."
    )
    drain_s: float = Field(
        60.0, ge=0, description="Longest wait of a replica that is drained for its episodes to end; then it hands back."
    )
    history: Literal["template", "keep"] = Field(
        "template",
        description="Treatment of earlier replies that the chat template would change. template: a new token sequence "
        "begins, as the deployed model sees it. keep: the conversation goes on behind what was sampled.",
    )
    constrained: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="Treatment of request parameters that would constrain what is sampled, such as response_format.",
    )
    tool_call_parser: str = Field(
        "auto", description="SGLang's parser of tool calls; auto: the one that it finds for the chat template."
    )
    reasoning_parser: str = Field(
        "auto", description="SGLang's parser of reasoning; auto: the one that it finds for the chat template."
    )
