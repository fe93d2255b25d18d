"""Conditions on tickets, groups and heartbeats beyond the types of their fields. Pure.

A value that passes is safe to use: lengths agree, spans tile the tokens, and every number is within the range of
float32 arithmetic, JSON and calendar dates. Other values raise `WireError` with one short line. A replica applies the
same checks to its own groups before it commits them.
"""

import ipaddress
import math
import re
from typing import Any

import numpy as np

from headrace.common.wire.structs import MAX_COMPLETIONS, MAX_TOKEN, Group, Heartbeat, Rollout, Ticket, VersionSpan

MAX_REASON_CHARS = 300
MAX_NAME_CHARS = 200
MAX_URL_CHARS = 500
MAX_REFERENCE_DEPTH = 32
MAX_REFERENCE_VALUES = 1_000_000
MAX_REQUEST_TOKENS = 2**25
"""Prompt tokens times completions, since an engine receives the prompt once for each completion."""
LOGPROB_TOLERANCE = 1e-3
"""Rounding may raise log-probabilities this far above 0."""
MIN_LOGPROB = -80.0
"""exp(-logprob), part of importance weights, must fit in float32, as exp(80) does; no engine samples such a token."""
MAX_REWARD = 1e30
"""Up to this size squares and sums of rewards are finite in float64."""
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

    `joined`: the tokens and the log-probabilities of all rollouts, each in one array, if the caller has them. They are
    checked together, because one numpy call per rollout costs more than the check of a short completion.
    """
    check_ticket(group.ticket)
    _expect_name(f"group {group.ticket.id}: replica", group.replica)
    name, expected, allowed = group.ticket.id, group.ticket.num_completions, group.ticket.sampling.max_new_tokens
    _expect(len(group.rollouts) == expected, f"group {name} has {len(group.rollouts)} rollouts, expected {expected}")
    for index, rollout in enumerate(group.rollouts):
        problem = _rollout_problem(rollout, allowed)
        if problem:
            raise WireError(f"group {name}, rollout {index}: {problem}")
    if joined is None:
        every = group.rollouts
        joined = (
            np.concatenate([one.tokens for one in every]),
            np.concatenate([one.behaviour_logprobs for one in every]),
        )
    if _numbers_problem(*joined):
        for index, rollout in enumerate(group.rollouts):
            if problem := _numbers_problem(rollout.tokens, rollout.behaviour_logprobs):
                raise WireError(f"group {name}, rollout {index}: {problem}")


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
    tokens, count, sampling = ticket.prompt_tokens, ticket.num_completions, ticket.sampling
    if not tokens:
        return "has no prompt tokens"
    if not 1 <= count <= MAX_COMPLETIONS:
        return f"asks for {count} completions, expected 1 to {MAX_COMPLETIONS}"
    if len(tokens) * count > MAX_REQUEST_TOKENS:
        return f"asks for {count} completions of {len(tokens)} prompt tokens, more than {MAX_REQUEST_TOKENS} in all"
    if problem := _tokens_problem(tokens):
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
    return _reference_problem(ticket.reference)


def _reference_problem(reference: dict[str, Any]) -> str:
    """Only JSON values, within bounds on depth and number; walks level by level, without recursion."""
    level: list[Any] = [reference]
    num_values = 0
    for _ in range(MAX_REFERENCE_DEPTH):
        inner: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                if any(type(key) is not str for key in value):
                    return "has a reference with keys that are not text"
                inner += value.values()
            elif kind is list:
                inner += value
            elif kind is float:
                if not math.isfinite(value):
                    return "has a reference with a number that is not finite"
            elif kind not in (str, int, bool, type(None)):
                return f"has a reference with a {kind.__name__}, which JSON does not have"
        num_values += len(inner)
        if num_values > MAX_REFERENCE_VALUES:
            return f"has a reference of more than {MAX_REFERENCE_VALUES} values"
        if not inner:
            return ""
        level = inner
    return f"has a reference that is nested more than {MAX_REFERENCE_DEPTH} deep"


def _rollout_problem(rollout: Rollout, max_new_tokens: int) -> str:
    tokens, mask, logprobs = rollout.tokens, rollout.loss_mask, rollout.behaviour_logprobs
    num_trained = mask.count(1)
    if len(mask) != len(tokens):
        return f"{len(mask)} mask entries for {len(tokens)} tokens"
    if num_trained + mask.count(0) != len(mask):
        return "loss_mask has values other than 0 and 1"
    if num_trained == 0:
        return "no trained token"
    if num_trained > max_new_tokens:
        return f"{num_trained} trained tokens, more than the ticket's max_new_tokens {max_new_tokens}"
    if len(logprobs) != num_trained:
        return f"{len(logprobs)} behaviour_logprobs for {num_trained} trained tokens"
    if not math.isfinite(rollout.reward) or abs(rollout.reward) > MAX_REWARD:
        return f"the reward {rollout.reward:g} is not finite, or beyond {MAX_REWARD:g}"
    return _spans_problem(rollout.version_spans, num_trained)


def _numbers_problem(tokens: np.ndarray, logprobs: np.ndarray) -> str:
    lowest = int(tokens.min())
    return f"token {lowest}, expected 0 to {MAX_TOKEN}" if lowest < 0 else _logprobs_problem(logprobs)


def _tokens_problem(tokens: list[int]) -> str:
    lowest, highest = min(tokens), max(tokens)
    if lowest >= 0 and highest <= MAX_TOKEN:
        return ""
    return f"token {lowest if lowest < 0 else highest}, expected 0 to {MAX_TOKEN}"


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


def _expect_name(what: str, name: str) -> None:
    problem = name_problem(name)
    _expect(not problem, f"{what} {problem}")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise WireError(problem)
