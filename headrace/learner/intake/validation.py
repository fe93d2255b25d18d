"""Which groups the learner refuses, by what only it knows of the run: pure functions.

`headrace.common.wire` has held a group against itself; here it is held against the run's vocabulary, sizes and
versions. A group that passes can be packed and trained. Versions at or below the highest are legitimate even if nobody
remembers them: they may be of a lost line of weights.
"""

from typing import NamedTuple, get_args

import numpy as np

from headrace.common.wire import Group, Rollout, TicketKind, one_line

_KINDS = get_args(TicketKind)


class GroupLimits(NamedTuple):
    """What a group may not go beyond."""

    vocab_size: int
    """Rows of the embedding: token ids are below it."""
    group_size: int
    """Rollouts of a training group."""
    num_eval_samples: int
    """Rollouts of an evaluation group."""
    max_sequence_tokens: int
    """Of a prompt with its completion, as it is packed."""
    highest_version: int
    """The newest weight version that anybody can have sampled with."""


class GroupRejected(ValueError):
    """A group that must not be used; the text, one short line, says why."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


def validate_group(group: Group, entry_ticket_id: str, limits: GroupLimits) -> None:
    """Raises `GroupRejected`, with the reason, unless the learner can use the group.

    `group` has passed `headrace.common.wire.decode_group`; `entry_ticket_id` stands beside it in its stream.
    """
    problem = _group_problem(group, entry_ticket_id, limits)
    if problem:
        raise GroupRejected(f"group {group.ticket.id} {problem}")
    highest = int(np.concatenate([rollout.tokens for rollout in group.rollouts]).max())
    for index, rollout in enumerate(group.rollouts):
        problem = _rollout_problem(rollout, highest, limits)
        if problem:
            raise GroupRejected(f"group {group.ticket.id}, rollout {index}: {problem}")


def _group_problem(group: Group, entry_ticket_id: str, limits: GroupLimits) -> str:
    ticket = group.ticket
    if ticket.id != entry_ticket_id:
        return f"stands in the entry of ticket {entry_ticket_id!r}"
    if ticket.kind not in _KINDS:
        return f"is of kind {ticket.kind!r}, expected train or eval"
    expected = limits.group_size if ticket.kind == "train" else limits.num_eval_samples
    if len(group.rollouts) != expected:
        return f"has {len(group.rollouts)} rollouts, expected {expected} for {ticket.kind}"
    if problem := _tokens_problem(max(ticket.prompt_tokens), limits.vocab_size):
        return f"has a prompt with {problem}"
    longest = len(ticket.prompt_tokens) + max(len(rollout.tokens) for rollout in group.rollouts)
    if longest > limits.max_sequence_tokens:
        return f"is too long: a sequence of {longest} tokens, more than {limits.max_sequence_tokens}"
    return ""


def _rollout_problem(rollout: Rollout, highest_token: int, limits: GroupLimits) -> str:
    """`highest_token`: of the group; where that is in the vocabulary all are."""
    if highest_token >= limits.vocab_size and (
        problem := _tokens_problem(int(rollout.tokens.max()), limits.vocab_size)
    ):
        return problem
    for span in rollout.version_spans:
        if span.version < 1:
            return f"sampled by version {span.version}, and the first is 1"
        if span.version > limits.highest_version:
            return f"sampled by version {span.version}, from the future: the highest is {limits.highest_version}"
    return ""


def _tokens_problem(highest: int, vocab_size: int) -> str:
    return f"token {highest} outside the vocabulary of {vocab_size}" if highest >= vocab_size else ""
