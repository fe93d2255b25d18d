"""Metrics of a batch's episodes; a batch of completions has none of them. Pure functions."""

from collections.abc import Sequence
from typing import get_args

from headrace.common.wire import FinishReason, Group, Rollout, Turn


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the groups whose tickets have limits; empty if there are none."""
    groups = [group for group in groups if group.ticket.limits is not None]
    episodes = [rollout for group in groups for rollout in group.rollouts]
    if not episodes:
        return {}
    count = len(episodes)
    turns = [sum(turn.role == "assistant" for turn in episode.turns) for episode in episodes]
    tokens = sum(len(segment.tokens) for group in groups for segment in group.segments)
    failed = sum(episode.failed_episodes for episode in episodes)
    return {
        "turns_mean": sum(turns) / count,
        "turns_max": float(max(turns)),
        "segments_mean": sum(len(episode.segments) for episode in episodes) / count,
        "split_share": sum(len(episode.segments) > 1 for episode in episodes) / count,
        "rewritten_share": sum(_is_rewritten(episode) for episode in episodes) / count,
        "environment_token_share": 1 - sum(group.num_trained_tokens for group in groups) / tokens,
        **_finish_shares(episodes),
        "model_s_mean": sum(_seconds(turn) for one in episodes for turn in one.turns if turn.role == "assistant")
        / count,
        "environment_s_mean": sum(_seconds(turn) for one in episodes for turn in one.turns if turn.role != "assistant")
        / count,
        "prefix_cache_share": _prefix_cache_share(groups),
        "episodes_failed_share": failed / (failed + count),
    }


def _finish_shares(episodes: Sequence[Rollout]) -> dict[str, float]:
    reasons = [episode.finish_reason for episode in episodes]
    return {f"finished_{reason}_share": reasons.count(reason) / len(reasons) for reason in get_args(FinishReason)}


def _is_rewritten(episode: Rollout) -> bool:
    return any(segment.origin == "history" for segment in episode.segments)


def _seconds(turn: Turn) -> float:
    return max(0.0, turn.ended_s - turn.began_s)


def _prefix_cache_share(groups: Sequence[Group]) -> float:
    """The share of the replies' contexts that the engine had in its prefix cache, by tokens."""
    cached = total = 0
    for group in groups:
        for episode in group.rollouts:
            for turn in episode.turns:
                if turn.role == "assistant":
                    cached += turn.cached_tokens
                    total += len(group.prompt(episode.segments[turn.segment])) + turn.start
    return cached / total
