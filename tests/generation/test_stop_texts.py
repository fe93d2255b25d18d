"""Stop texts in SGLang's request: patterns that it accepts, and that match the text however it is tokenized."""

import re
import re._parser as sre_parse  # type: ignore[import-not-found]
from typing import Any

import pytest
from msgspec.structs import replace

from headrace.common.wire.structs import MAX_STOP_CHARS, MAX_STOPS
from headrace.generation.engine.completions import generate_body
from tests.support.factories import SAMPLING, make_ticket
from tests.support.sglang_source import names_of

TEXTS = [
    "\n\n",
    "</answer>",
    "###",
    "a b",
    "(?:x)",
    "[.*]+$",
    "é\\d",
    "終",
    "#" * MAX_STOP_CHARS,
    "終" * MAX_STOP_CHARS,
]


def asked(*stop: str) -> dict[str, Any]:
    ticket = make_ticket(sampling=replace(SAMPLING, stop=list(stop)))
    found: dict[str, Any] = generate_body(ticket, ["r"])["sampling_params"]
    return found


def test_without_stop_texts_the_request_has_no_pattern() -> None:
    assert not [name for name in asked() if name.startswith("stop") and name != "stop_token_ids"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_pattern_matches_its_literal_text_only(text: str) -> None:
    (pattern,) = asked(text)["stop_regex"]
    assert re.search(pattern, f"before{text}after") and not re.search(pattern, f"before{text[:-1]}")
    assert pattern not in text, "SGLang would cut the completion's text where it stands"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_sglang_accepts_the_pattern_and_compares_one_token_per_character(text: str) -> None:
    names = names_of(
        "srt/sampling/sampling_params.py",
        *("MAX_STOP_REGEX_LEN", "MAX_STOP_REGEX_COUNT", "MAX_LEN"),
        *("get_max_seq_length", "_max_length_from_subpattern"),
        sre_parse=sre_parse,
    )
    (pattern,) = asked(text)["stop_regex"]
    assert len(pattern.encode()) <= names["MAX_STOP_REGEX_LEN"] and names["MAX_STOP_REGEX_COUNT"] >= MAX_STOPS
    assert names["get_max_seq_length"](pattern) == len(text)
