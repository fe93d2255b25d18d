"""Conditions on the rollouts of a group beyond the types of their fields. Pure.

Each function returns the first problem as one short text, or an empty one.
"""

import math

import numpy as np

from headrace.common.wire.structs import MAX_METRIC_CHARS, MAX_TOKEN, Group, Limits, Rollout, Segment, VersionSpan

LOGPROB_TOLERANCE = 1e-3
"""Rounding may raise log-probabilities this far above 0."""
MIN_LOGPROB = -80.0
"""exp(-logprob), part of importance weights, must fit in float32, as exp(80) does; no engine samples such a token."""
MAX_REWARD = 1e30
"""Up to this size squares and sums of rewards are finite in float64."""
COMPLETION_REASONS = ("stop", "length")


def prompts_problem(group: Group) -> str:
    """Further prompts are not empty, distinct, and used; the ticket's is not empty if a segment begins with it."""
    used = {segment.prompt for segment in group.segments}
    if max(used) > len(group.prompts):
        return f"has a segment behind prompt {max(used)} of {len(group.prompts)}"
    if 0 in used and not group.ticket.prompt_tokens:
        return "has a segment behind the ticket's prompt, which is empty"
    if not group.prompts:
        return ""
    if missing := set(range(1, len(group.prompts) + 1)) - used:
        return f"has a prompt {min(missing)} that no segment uses"
    for index, prompt in enumerate(group.prompts, 1):
        if not len(prompt):
            return f"has an empty prompt {index}"
        if int(prompt.min()) < 0:
            return f"has a prompt with token {int(prompt.min())}, expected 0 to {MAX_TOKEN}"
    every = {np.array(group.ticket.prompt_tokens, np.int32).tobytes(), *(one.tobytes() for one in group.prompts)}
    return "" if len(every) == len(group.prompts) + 1 else "has the same prompt twice"


def rollout_problem(group: Group, rollout: Rollout) -> str:
    if not math.isfinite(rollout.reward) or abs(rollout.reward) > MAX_REWARD:
        return f"the reward {rollout.reward:g} is not finite, or beyond {MAX_REWARD:g}"
    limits, allowed = group.ticket.limits, group.ticket.sampling.max_new_tokens
    if limits is None and len(rollout.segments) != 1:
        return f"{len(rollout.segments)} segments, expected 1 for a ticket without limits"
    for index, segment in enumerate(rollout.segments):
        if problem := _segment_problem(segment):
            return f"segment {index}: {problem}" if len(rollout.segments) > 1 else problem
    if problem := metrics_problem(rollout.metrics):
        return problem
    if limits is not None:
        return _episode_problem(group, rollout, limits)
    if rollout.num_trained_tokens > allowed:
        return f"{rollout.num_trained_tokens} trained tokens, more than the ticket's max_new_tokens {allowed}"
    if rollout.turns or rollout.segments[0].prompt or rollout.finish_reason not in COMPLETION_REASONS:
        return "turns, a prompt of its own, or the end of an episode, although the ticket has no limits"
    return ""


def metrics_problem(metrics: dict[str, float]) -> str:
    for name, value in metrics.items():
        if not name or len(name) > MAX_METRIC_CHARS or not name.isprintable() or " " in name:
            return f"a metric is named {name!r}, expected 1 to {MAX_METRIC_CHARS} printable characters without spaces"
        if not math.isfinite(value) or abs(value) > MAX_REWARD:
            return f"the metric {name} is {value:g}, which is not finite, or beyond {MAX_REWARD:g}"
    return ""


def numbers_problem(tokens: np.ndarray, logprobs: np.ndarray) -> str:
    """Of all tokens and log-probabilities of a rollout, or of a group."""
    lowest = int(tokens.min())
    return f"token {lowest}, expected 0 to {MAX_TOKEN}" if lowest < 0 else _logprobs_problem(logprobs)


def _segment_problem(segment: Segment) -> str:
    tokens, mask, logprobs = segment.tokens, segment.loss_mask, segment.behaviour_logprobs
    num_trained = mask.count(1)
    if len(mask) != len(tokens):
        return f"{len(mask)} mask entries for {len(tokens)} tokens"
    if num_trained + mask.count(0) != len(mask):
        return "loss_mask has values other than 0 and 1"
    if num_trained == 0:
        return "no trained token"
    if len(logprobs) != num_trained:
        return f"{len(logprobs)} behaviour_logprobs for {num_trained} trained tokens"
    return _spans_problem(segment.version_spans, num_trained)


def _episode_problem(group: Group, rollout: Rollout, limits: Limits) -> str:
    num_turns = sum(turn.role == "assistant" for turn in rollout.turns)
    for name, value, most in (
        ("segments", len(rollout.segments), limits.max_segments),
        ("turns", num_turns, limits.max_turns),
        ("trained tokens", rollout.num_trained_tokens, limits.max_tokens),
    ):
        if value > most:
            return f"{value} {name}, more than the ticket's limit of {most}"
    longest = max(len(group.prompt(segment)) + len(segment.tokens) for segment in rollout.segments)
    if longest > limits.max_context_tokens:
        return f"a segment of {longest} tokens, more than the ticket's limit of {limits.max_context_tokens}"
    return _turns_problem(rollout)


def _turns_problem(rollout: Rollout) -> str:
    """Turns lie in their segments one behind the other; replies are exactly the sampled tokens."""
    masks = [bytearray(len(segment.tokens)) for segment in rollout.segments]
    segment, place = 0, 0
    for index, turn in enumerate(rollout.turns):
        if turn.segment != segment:
            segment, place = turn.segment, 0
        if turn.segment >= len(masks) or not place <= turn.start < turn.end <= len(masks[segment]):
            return f"turn {index} has tokens {turn.start} to {turn.end} of segment {turn.segment}, which are not there"
        if turn.role == "assistant":
            masks[segment][turn.start : turn.end] = b"\1" * (turn.end - turn.start)
        place = turn.end
    wrong = [i for i, mask in enumerate(masks) if mask != rollout.segments[i].loss_mask or not mask[0]]
    return f"the replies are not the sampled tokens of segment {wrong[0]}, from its first token on" if wrong else ""


def _logprobs_problem(logprobs: np.ndarray) -> str:
    lowest, highest = float(logprobs.min()), float(logprobs.max())
    if lowest >= MIN_LOGPROB and highest <= LOGPROB_TOLERANCE:
        return ""
    if not math.isfinite(lowest) or not math.isfinite(highest):
        return "a behaviour log-probability is not finite"
    if highest > LOGPROB_TOLERANCE:
        return f"behaviour log-probability {highest:.4g} is above 0"
    return f"behaviour log-probability {lowest:.4g} is below {MIN_LOGPROB:g}: no token is sampled with it"


def _spans_problem(spans: list[VersionSpan], num_tokens: int) -> str:
    place = 0
    for span in spans:
        if span.start != place or span.end <= place:
            place = -1
            break
        place = span.end
    if place == num_tokens:
        return ""
    shown = ", ".join(str((span.version, span.start, span.end)) for span in spans[:5])
    return f"version spans [{shown}{', …' * (len(spans) > 5)}] do not tile {num_tokens} tokens"
