"""Builds SGLang's request for a ticket, and checks and converts its reply. Pure.

In a checked completion every token has a finite behaviour log-probability and belongs to one version span, as reported
by the engine.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

import msgspec
import numpy as np

from headrace.common.wire import MAX_TOKEN, FinishReason, Ticket, VersionSpan


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a ticket's prompt; its last token is the stop token, if there is one."""

    tokens: list[int]
    behaviour_logprobs: np.ndarray
    """float32 of shape `(len(tokens),)`, at the sampling temperature."""
    version_spans: list[VersionSpan]
    finish_reason: FinishReason
    text: str


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
        "sampling_params": {
            "temperature": ticket.sampling.temperature,
            "max_new_tokens": ticket.sampling.max_new_tokens,
            "stop_token_ids": ticket.sampling.stop_token_ids,
            "top_p": 1.0,
            "top_k": -1,
            **({"stop_regex": [_pattern(text) for text in ticket.sampling.stop]} if ticket.sampling.stop else {}),
        },
        "return_logprob": True,
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
        finish_reason=cast(FinishReason, meta.finish_reason.type),
        text=sample.text,
    )


def _problem(sample: Sample) -> str:
    meta, num_tokens = sample.meta_info, len(sample.output_ids)
    if meta.finish_reason.type not in get_args(FinishReason):
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
