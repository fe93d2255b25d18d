"""The limits of an episode, from the configuration and the model's context."""

from headrace.common.config import RunConfig
from headrace.common.wire import Limits
from headrace.common.wire.structs import MAX_SEQUENCE_TOKENS


def episode_limits(config: RunConfig, context: int) -> Limits:
    """`context`: the longest sequence that the engine accepts, in tokens."""
    environment = config.environment
    longest = min(context, config.learner.micro_batch_tokens, MAX_SEQUENCE_TOKENS)
    return Limits(
        max_turns=environment.max_turns,
        max_tokens=environment.max_tokens or environment.max_turns * config.sampling.max_new_tokens,
        max_context_tokens=environment.max_context_tokens or longest,
        max_segments=environment.max_segments,
    )
