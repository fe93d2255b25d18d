"""Poisons: payloads that no learner may take in, each with a name and the reason by which it is refused.

Each is made from a valid group, so that nothing but its poison is wrong with it. They are extreme, so that they are
poison to every run: to the limits of the tests as to those of a real model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from headrace.common.wire import Group, encode
from tests.support.factories import make_rollout

FUTURE = 2**52
NO_TOKEN = 2**31 - 1
SURROGATE = msgspec.Raw(b"\xa3\xed\xa0\x80")


def altered(payload: bytes, path: tuple[str | int, ...], value: Any) -> bytes:
    """With `value` (a `msgspec.Raw` stands for bytes as they are) where `path` leads, be it there or not."""
    tree = place = msgspec.msgpack.decode(payload)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return msgspec.msgpack.encode(tree)


class Poison(NamedTuple):
    """What stands in the stream of groups under `ticket_id`; the refusal matches the pattern `reason`."""

    name: str
    payload: bytes
    reason: str
    ticket_id: str


def poisons(group: Group) -> list[Poison]:
    """Every named poison, made from one valid group."""
    found = [Poison(name, poison(group), reason, group.ticket.id) for name, reason, poison in POISONS]
    return [*found, Poison("another ticket's entry", encode(group), "in the entry of ticket 'other'", "other")]


def with_ticket(group: Group, **changes: Any) -> Group:
    return replace(group, ticket=replace(group.ticket, **changes))


def with_sampling(group: Group, **changes: Any) -> Group:
    return with_ticket(group, sampling=replace(group.ticket.sampling, **changes))


def with_last(group: Group, **changes: Any) -> Group:
    """The last rollout changed."""
    return replace(group, rollouts=[*group.rollouts[:-1], replace(group.rollouts[-1], **changes)])


def with_segment(group: Group, **changes: Any) -> Group:
    """The last rollout's last segment changed."""
    *segments, last = group.rollouts[-1].segments
    return with_last(group, segments=[*segments, replace(last, **changes)])


def shortened(group: Group, field: str) -> Group:
    """A list of the last segment without its last element."""
    return with_segment(group, **{field: getattr(group.rollouts[-1].segments[-1], field)[:-1]})


def with_logprob(group: Group, value: float) -> Group:
    logprobs = group.rollouts[-1].segments[-1].behaviour_logprobs.copy()
    logprobs[-1] = value
    return with_segment(group, behaviour_logprobs=logprobs)


def with_token(group: Group, token: int) -> Group:
    tokens = group.rollouts[-1].segments[-1].tokens.copy()
    tokens[-1] = token
    return with_segment(group, tokens=tokens)


def with_version(group: Group, version: int) -> Group:
    *spans, last = group.rollouts[-1].segments[-1].version_spans
    return with_segment(group, version_spans=[*spans, replace(last, version=version)])


def doubled(group: Group) -> Group:
    """The last rollout with the same segment twice."""
    return with_last(group, segments=group.rollouts[-1].segments * 2)


def resized(group: Group, by: int) -> Group:
    """Without a contradiction in itself: only the run knows better."""
    count = len(group.rollouts) + by
    return replace(with_ticket(group, num_completions=count), rollouts=(group.rollouts * 2)[:count])


def all_long(group: Group, num_tokens: int) -> Group:
    long = make_rollout(tokens=(0,) * num_tokens)
    return replace(with_sampling(group, max_new_tokens=num_tokens), rollouts=[long] * len(group.rollouts))


TOKENS = ("rollouts", 0, "segments", 0, "tokens")
POISONS: list[tuple[str, str, Callable[[Group], bytes]]] = [
    ("nothing", "cannot decode 0 bytes", lambda g: b""),
    ("undecodable", "cannot decode 9 bytes", lambda g: b"\xc1 garbage"),
    ("half of it", "cannot decode .* truncated", lambda g: encode(g)[: len(encode(g)) // 2]),
    ("no UTF-8", "cannot decode .*utf-8", lambda g: altered(encode(g), ("rollouts", 0, "text"), SURROGATE)),
    ("another schema", "schema 1, expected 2 or 3", lambda g: encode(replace(g, schema=1))),
    ("a ticket of another schema", "schema 4, expected 1 or 2 or 3", lambda g: encode(with_ticket(g, schema=4))),
    ("another layout", "schema 7, expected 2 or 3", lambda g: msgspec.msgpack.encode({"schema": 7, "rows": []})),
    ("too few rollouts", "has .+ rollouts, expected .+", lambda g: encode(replace(g, rollouts=g.rollouts[:-1]))),
    ("loss_mask too short", "mask entries for .* tokens", lambda g: encode(shortened(g, "loss_mask"))),
    ("too few log-probabilities", "behaviour_logprobs for", lambda g: encode(shortened(g, "behaviour_logprobs"))),
    ("spans that do not tile", "do not tile", lambda g: encode(shortened(g, "version_spans"))),
    ("log-probability NaN", "log-probability is not finite", lambda g: encode(with_logprob(g, np.nan))),
    ("log-probability -inf", "log-probability is not finite", lambda g: encode(with_logprob(g, -np.inf))),
    ("log-probability positive", "log-probability 0.5 is above 0", lambda g: encode(with_logprob(g, 0.5))),
    ("log-probability impossible", "log-probability -3.4e.38 is below", lambda g: encode(with_logprob(g, -3.4e38))),
    ("no segments", "rollout 0: no segments", lambda g: altered(encode(g), ("rollouts", 0, "segments"), [])),
    ("an episode that was not asked for", "segments, expected 1 for a ticket without", lambda g: encode(doubled(g))),
    ("metric NaN", "the metric x is nan", lambda g: encode(with_last(g, metrics={"x": np.nan}))),
    ("prompt out of range", "behind prompt 5 of 0", lambda g: encode(with_segment(g, prompt=5))),
    ("reward NaN", "the reward nan is not finite", lambda g: encode(with_last(g, reward=np.nan))),
    ("reward infinite", "the reward inf is not finite", lambda g: encode(with_last(g, reward=np.inf))),
    ("token outside the vocabulary", f"token {NO_TOKEN} outside the vo", lambda g: encode(with_token(g, NO_TOKEN))),
    ("half a token", "11 bytes of tokens", lambda g: altered(encode(g), TOKENS, bytes(11))),
    ("tokens of schema 1", "got `array`", lambda g: altered(encode(g), TOKENS, [1])),
    ("token negative", "token -1, expected", lambda g: encode(with_token(g, -1))),
    ("prompt outside it", "prompt with token .* outside", lambda g: encode(with_ticket(g, prompt_tokens=[NO_TOKEN]))),
    ("version from the future", f"version {FUTURE}, from the future", lambda g: encode(with_version(g, FUTURE))),
    ("version 0", "version 0, and the first is 1", lambda g: encode(with_version(g, 0))),
    ("group too small", "rollouts, expected .+ for", lambda g: encode(resized(g, -1))),
    ("group too large", "rollouts, expected .+ for", lambda g: encode(resized(g, 1))),
    ("too long to pack", "too long: a sequence of 131...", lambda g: encode(all_long(g, 2**17))),
    (
        "more than was asked for",
        "4 trained tokens, more than",
        lambda g: encode(with_sampling(all_long(g, 4), max_new_tokens=3)),
    ),
    ("temperature 0", "temperature 0, expected", lambda g: encode(with_sampling(g, temperature=0.0))),
    ("temperature NaN", "temperature nan, expected", lambda g: encode(with_sampling(g, temperature=np.nan))),
    ("unknown kind", "Invalid enum value 'test'", lambda g: encode(with_ticket(g, kind="test"))),
    ("no id", "ticket id is empty", lambda g: encode(with_ticket(g, id=""))),
]
"""Name, pattern of the refusal's reason, and how it is made from a valid group."""
