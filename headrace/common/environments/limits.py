"""The limits of an episode, from the configuration and the model's context."""

from headrace.common.config import RunConfig
from headrace.common.wire import Limits
from headrace.common.wire.structs import MAX_SEQUENCE_TOKENS

END_OF_CONTEXT = 6
"""Tokens at the end of the context that a conversation cannot use: SGLang 0.5.23 refuses a prompt of more than
`context - 7` tokens, and ends every reply at `context - 2`."""


def episode_limits(config: RunConfig, context: int) -> Limits:
    """`context`: the model's, in tokens."""
    environment = config.environment
    longest = min(context - END_OF_CONTEXT, config.learner.micro_batch_tokens, MAX_SEQUENCE_TOKENS)
    return Limits(
        max_turns=environment.max_turns,
        max_tokens=environment.max_tokens or environment.max_turns * config.sampling.max_new_tokens,
        max_context_tokens=environment.max_context_tokens or longest,
        max_segments=environment.max_segments,
    )
