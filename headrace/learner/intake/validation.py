"""Checks groups against what only the learner knows: the run's vocabulary, sizes and versions. Pure functions.

`headrace.common.wire` has checked that a group is consistent in itself. A group that passes both can be packed and
trained. Unknown versions up to the highest are valid: they may come from weights before a rollback.
"""

from typing import NamedTuple, get_args

import numpy as np

from headrace.common.wire import Group, Rollout, TicketKind, one_line

_KINDS = get_args(TicketKind)


class GroupLimits(NamedTuple):
    """The limits that a group must keep."""

    vocab_size: int
    """The rows of the embedding; token ids are below it."""
    group_size: int
    """The number of rollouts in a training group."""
    num_eval_samples: int
    """The number of rollouts in an evaluation group."""
    max_sequence_tokens: int
    """The longest prompt with its completion that can be packed."""
    highest_version: int
    """The newest weight version that a replica can have."""


class GroupRejected(ValueError):
    """A group that must not be used; the text is one short line with the reason."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


def validate_group(group: Group, entry_ticket_id: str, limits: GroupLimits) -> None:
    """Raises `GroupRejected` unless the learner can use the group.

    `group` has passed `headrace.common.wire.decode_group`; `entry_ticket_id` is the id in its stream entry.
    """
    problem = _group_problem(group, entry_ticket_id, limits)
    if problem:
        raise GroupRejected(f"group {group.ticket.id} {problem}")
    highest = int(np.concatenate([*group.prompts, *(segment.tokens for segment in group.segments)]).max())
    for index, rollout in enumerate(group.rollouts):
        problem = _rollout_problem(rollout, highest, limits)
        if problem:
            raise GroupRejected(f"group {group.ticket.id}, rollout {index}: {problem}")


def _group_problem(group: Group, entry_ticket_id: str, limits: GroupLimits) -> str:
    ticket = group.ticket
    if ticket.id != entry_ticket_id:
        return f"is in the entry of ticket {entry_ticket_id!r}"
    if ticket.kind not in _KINDS:
        return f"is of kind {ticket.kind!r}, expected train or eval"
    expected = limits.group_size if ticket.kind == "train" else limits.num_eval_samples
    if len(group.rollouts) != expected:
        return f"has {len(group.rollouts)} rollouts, expected {expected} for {ticket.kind}"
    highest = max(max(ticket.prompt_tokens, default=0), *(int(prompt.max()) for prompt in group.prompts), 0)
    if problem := _tokens_problem(highest, limits.vocab_size):
        return f"has a prompt with {problem}"
    longest = max(len(group.prompt(segment)) + len(segment.tokens) for segment in group.segments)
    if longest > limits.max_sequence_tokens:
        return f"is too long: a sequence of {longest} tokens, more than {limits.max_sequence_tokens}"
    return ""


def _rollout_problem(rollout: Rollout, highest_token: int, limits: GroupLimits) -> str:
    """`highest_token`: the group's; if it is in the vocabulary, all are."""
    if highest_token >= limits.vocab_size:
        of_rollout = max(int(segment.tokens.max()) for segment in rollout.segments)
        if problem := _tokens_problem(of_rollout, limits.vocab_size):
            return problem
    for span in rollout.version_spans:
        if span.version < 1:
            return f"sampled by version {span.version}, and the first is 1"
        if span.version > limits.highest_version:
            return f"sampled by version {span.version}, from the future: the highest is {limits.highest_version}"
    return ""


def _tokens_problem(highest: int, vocab_size: int) -> str:
    return f"token {highest} outside the vocabulary of {vocab_size}" if highest >= vocab_size else ""
