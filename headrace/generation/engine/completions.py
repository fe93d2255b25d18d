"""Builds SGLang's requests for a ticket and for a turn, and checks and converts the replies. Pure.

In a checked completion every token has a finite behaviour log-probability and belongs to one version span, as reported
by the engine.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

import msgspec
import numpy as np

from headrace.common.wire import MAX_TOKEN, Sampling, Ticket, VersionSpan

SampledFinish = Literal["stop", "length"]
"""How sampling ends: at a stop token or stop text, or at `max_new_tokens`."""

UNCHANGED_DISTRIBUTION: dict[str, Any] = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "logit_bias": None,
}


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt; its last token is the stop token, if there is one."""

    tokens: list[int]
    behaviour_logprobs: np.ndarray
    """float32 of shape `(len(tokens),)`, at the sampling temperature."""
    version_spans: list[VersionSpan]
    finish_reason: SampledFinish
    text: str


class TurnRequest(NamedTuple):
    """One reply to be sampled behind exactly `prompt_tokens`."""

    prompt_tokens: Sequence[int]
    sampling: Sampling
    rid: str
    """The request's name, with which it can be aborted; no two requests in flight have the same."""


@dataclass(frozen=True)
class Unconfirmed:
    """Versions that an engine was sampling with while it was still being confirmed to hold them."""

    versions: frozenset[int]
    num_failed_swaps: int
    """The engine's number when the request began."""


@dataclass(frozen=True)
class SampledTurn:
    """A reply. Its text has all sampled tokens but a stop token at the end, special tokens included."""

    completion: Completion
    cached_tokens: int
    """Number of tokens of the prompt that the engine had in its prefix cache."""
    unconfirmed: Unconfirmed | None = None
    """Unless None, `Engine.wait_until_confirmed` is to be asked before the turn is used for training."""


class Finish(msgspec.Struct):
    type: str
    message: str | None = None


class Span(msgspec.Struct):
    version: str
    start: int
    end: int


class Meta(msgspec.Struct):
    finish_reason: Finish
    output_token_logprobs: list[tuple[float | None, int, str | None]]
    weight_versions: list[Span] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Sample(msgspec.Struct):
    """One entry of the reply to `/generate`; SGLang sends a number that is not finite as null."""

    text: str
    output_ids: list[Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN)]]
    meta_info: Meta


def generate_body(ticket: Ticket, rids: list[str]) -> dict[str, Any]:
    """The body for `/generate`. It repeats the prompt for each completion: with `n`, SGLang replaces the request ids
    and is slower."""
    return {
        "input_ids": [ticket.prompt_tokens] * len(rids),
        "rid": rids,
        "sampling_params": _sampling_params(ticket.sampling),
        "return_logprob": True,
    }


def turn_body(request: TurnRequest) -> dict[str, Any]:
    """The body for `/generate`. Parameters are sent even if they are SGLang's defaults, which an engine's operator may
    change. Special tokens are kept in the text, because parsers of tool calls look for them."""
    return {
        "input_ids": request.prompt_tokens,
        "rid": rid_of(request.rid),
        "sampling_params": _sampling_params(request.sampling) | UNCHANGED_DISTRIBUTION | {"skip_special_tokens": False},
        "return_logprob": True,
    }


def rid_of(name: str) -> str:
    """The request id. SGLang aborts by prefix, so no id may be a prefix of another."""
    return f"{name}."


def _sampling_params(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": sampling.stop_token_ids,
        "top_p": 1.0,
        "top_k": -1,
        **({"stop_regex": [_pattern(text) for text in sampling.stop]} if sampling.stop else {}),
    }


def _pattern(text: str) -> str:
    """A regular expression for SGLang's `stop_regex` that matches the stop text.

    SGLang's `stop` is not used for two reasons. It compares only as many last tokens as the text itself encodes to, so
    it misses a text that was sampled in smaller tokens; and it cuts the completion's text at the first occurrence of
    the stop text. For a regular expression it compares one token per character, and it cuts only at the expression's
    source text, `(?:…)`, which a completion does not contain.
    """
    return f"(?:{re.escape(text)})"


def to_completion(sample: Sample) -> Completion:
    """Converts a sample; raises `ValueError` with the reason if it is invalid."""
    problem = _problem(sample)
    if problem:
        raise ValueError(problem)
    meta = sample.meta_info
    return Completion(
        tokens=sample.output_ids,
        behaviour_logprobs=np.array([logprob for logprob, _, _ in meta.output_token_logprobs], dtype=np.float32),
        version_spans=[VersionSpan(to_version(span.version), span.start, span.end) for span in meta.weight_versions],
        finish_reason=cast(SampledFinish, meta.finish_reason.type),
        text=sample.text,
    )


def _problem(sample: Sample) -> str:
    meta, num_tokens = sample.meta_info, len(sample.output_ids)
    if meta.finish_reason.type not in get_args(SampledFinish):
        return f"finished with {meta.finish_reason.type}: {meta.finish_reason.message}"
    if num_tokens == 0:
        return "no tokens"
    if [token for _, token, _ in meta.output_token_logprobs] != sample.output_ids:
        return f"{len(meta.output_token_logprobs)} log-probabilities that are not those of the {num_tokens} tokens"
    if not all(logprob is not None and math.isfinite(logprob) for logprob, _, _ in meta.output_token_logprobs):
        return "a log-probability is not finite"
    edges = [0, *(span.end for span in meta.weight_versions)]
    starts = [span.start for span in meta.weight_versions]
    if starts != edges[:-1] or edges[-1] != num_tokens or sorted(set(edges)) != edges:
        spans = [(span.version, span.start, span.end) for span in meta.weight_versions]
        return f"weight_versions {spans} do not tile {num_tokens} tokens"
    return ""


def to_version(label: str) -> int:
    """The number of a version label. SGLang allows any text; Headrace uses numbers."""
    if not label.isdecimal():
        raise ValueError(f"weight version {label!r} is not a number")
    return int(label)
