"""Conditions on tickets, groups and heartbeats beyond the types of their fields. Pure.

A value that passes is safe to use: lengths agree, spans tile the tokens, and every number is within the range of
float32 arithmetic, JSON and calendar dates. Other values raise `WireError` with one short line. A replica applies the
same checks to its own groups before it commits them.
"""

import ipaddress
import re
from collections.abc import Sequence

import numpy as np

from headrace.common.wire.json_checks import json_problem, messages_problem, tools_problem
from headrace.common.wire.rollout_checks import numbers_problem, prompts_problem, rollout_problem
from headrace.common.wire.structs import (
    MAX_COMPLETIONS,
    MAX_SEGMENTS,
    MAX_SEQUENCE_TOKENS,
    MAX_TOKEN,
    MAX_TURNS,
    Group,
    Heartbeat,
    Limits,
    Rollout,
    Ticket,
)

MAX_REASON_CHARS = 300
MAX_NAME_CHARS = 200
MAX_URL_CHARS = 500
MAX_REQUEST_TOKENS = 2**25
"""Prompt tokens times completions, since an engine receives the prompt once for each completion."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""In this range divided logits are finite in float32; below it SGLang samples greedily."""

_URL = re.compile(
    r"https?://(?:(?P<name>[\w-]{1,63}(?:\.[\w-]{1,63})*)|\[(?P<ipv6>[0-9a-f:.]+)\])(?::(?P<port>\d{1,5}))?(?:/[\w.~/-]*)?",
    re.ASCII | re.IGNORECASE,
)
_IPV4 = re.compile(r"\d+\.\d+\.\d+\.\d+", re.ASCII)


class WireError(ValueError):
    """A payload cannot be decoded or is inconsistent; the text is one short line with what is wrong and where."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))


def one_line(text: str) -> str:
    """The text as at most `MAX_REASON_CHARS` printable characters."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MAX_REASON_CHARS + 1])
    line = "".join(shown)
    return line if len(line) <= MAX_REASON_CHARS else line[: MAX_REASON_CHARS - 1] + "…"


def check_ticket(ticket: Ticket) -> None:
    """Raises `WireError` naming the ticket and the problem."""
    _expect_name("ticket id", ticket.id)
    problem = _ticket_problem(ticket)
    _expect(not problem, f"ticket {ticket.id} {problem}")


def check_group(group: Group, joined: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    """Raises `WireError` naming the ticket and the problem.

    `joined`: the tokens and the log-probabilities of all segments, each in one array, if the caller has them. They are
    checked together, because one numpy call per rollout costs more than the check of a short completion.
    """
    check_ticket(group.ticket)
    _expect_name(f"group {group.ticket.id}: replica", group.replica)
    name, expected = group.ticket.id, group.ticket.num_completions
    _expect(len(group.rollouts) == expected, f"group {name} has {len(group.rollouts)} rollouts, expected {expected}")
    problem = prompts_problem(group)
    _expect(not problem, f"group {name} {problem}")
    for index, rollout in enumerate(group.rollouts):
        if problem := rollout_problem(group, rollout):
            raise WireError(f"group {name}, rollout {index}: {problem}")
    if numbers_problem(*(joined or _joined(group.rollouts))):
        for index, rollout in enumerate(group.rollouts):
            if problem := numbers_problem(*_joined([rollout])):
                raise WireError(f"group {name}, rollout {index}: {problem}")


def _joined(rollouts: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray]:
    every = [segment for rollout in rollouts for segment in rollout.segments]
    return np.concatenate([one.tokens for one in every]), np.concatenate([one.behaviour_logprobs for one in every])


def check_heartbeat(heartbeat: Heartbeat) -> None:
    """Raises `WireError` naming the replica and the problem."""
    _expect_name("replica", heartbeat.replica)
    _expect(is_url(heartbeat.url), f"replica {heartbeat.replica}: {heartbeat.url[:MAX_NAME_CHARS]!r} is no URL")
    waited, served = heartbeat.waiting_s, heartbeat.serving_s
    _expect(waited <= served * 1.001, f"replica {heartbeat.replica} waited {waited:g} s of {served:g} s")


def name_problem(name: str) -> str:
    """Why `name` cannot name a ticket or a replica; empty if it can."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME_CHARS:
        return f"has {len(name)} characters, more than {MAX_NAME_CHARS}"
    if not name.isprintable() or " " in name:
        return f"{name!r} has characters that are whitespace or cannot be printed"
    return ""


def is_url(url: str) -> bool:
    """Whether it is a valid URL: `http` or `https`, a host name or address, optionally a port and a path."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None or int(match["port"] or 0) > 65535:
        return False
    try:
        if match["ipv6"]:
            ipaddress.IPv6Address(match["ipv6"])
        elif _IPV4.fullmatch(match["name"]):
            ipaddress.IPv4Address(match["name"])
    except ValueError:
        return False
    return True


def _ticket_problem(ticket: Ticket) -> str:
    tokens, count, sampling, limits = ticket.prompt_tokens, ticket.num_completions, ticket.sampling, ticket.limits
    if not tokens and limits is None:
        return "has no prompt tokens"
    if not 1 <= count <= MAX_COMPLETIONS:
        return f"asks for {count} completions, expected 1 to {MAX_COMPLETIONS}"
    if len(tokens) * count > MAX_REQUEST_TOKENS:
        return f"asks for {count} completions of {len(tokens)} prompt tokens, more than {MAX_REQUEST_TOKENS} in all"
    if tokens and (problem := _tokens_problem(tokens)):
        return f"has a prompt with {problem}"
    if sampling.stop_token_ids and (problem := _tokens_problem(sampling.stop_token_ids)):
        return f"stops at {problem}"
    if not MIN_TEMPERATURE <= sampling.temperature <= MAX_TEMPERATURE:
        return f"has temperature {sampling.temperature:g}, expected {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
    if not 1 <= sampling.max_new_tokens <= MAX_TOKEN:
        return f"has max_new_tokens {sampling.max_new_tokens}, expected 1 to {MAX_TOKEN}"
    for name in ticket.avoid:
        if problem := name_problem(name):
            return f"avoids a replica whose name {problem}"
    if limits is not None and (problem := _limits_problem(limits)):
        return problem
    if ticket.tools and limits is None:
        return "has tools, but no limits: only an episode can call them"
    return (
        json_problem("a reference", ticket.reference)
        or messages_problem(ticket.messages)
        or tools_problem(ticket.tools)
    )


def _limits_problem(limits: Limits) -> str:
    most = Limits(MAX_TURNS, MAX_SEQUENCE_TOKENS * MAX_SEGMENTS, MAX_SEQUENCE_TOKENS, MAX_SEGMENTS)
    for name in Limits.__struct_fields__:
        value, highest = getattr(limits, name), getattr(most, name)
        if not 1 <= value <= highest:
            return f"has the limit {name} {value}, expected 1 to {highest}"
    return ""


def _tokens_problem(tokens: list[int]) -> str:
    lowest, highest = min(tokens), max(tokens)
    if lowest >= 0 and highest <= MAX_TOKEN:
        return ""
    return f"token {lowest if lowest < 0 else highest}, expected 0 to {MAX_TOKEN}"


def _expect_name(what: str, name: str) -> None:
    problem = name_problem(name)
    _expect(not problem, f"{what} {problem}")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise WireError(problem)
