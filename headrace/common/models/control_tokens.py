"""A tokenizer's control tokens: where they stand in a text, and how text that only looks like one stays text.

Only tokens marked as special, and those the tokenizer names as its own, are control tokens: `<think>` of Qwen3 is a
word of the model's that a prompt may use.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.common.wire import Message


class CannotQuote(ValueError):
    """A text with a control token's name that this tokenizer cannot take for plain text."""


class Part(NamedTuple):
    """A control token, or what is between two of them."""

    text: str
    tokens: list[int]
    start: int
    """Where its text begins."""
    is_control: bool


class Token(NamedTuple):
    id: int
    text: str
    """Which it stands for."""
    start: int


class ControlTokens:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.by_id = _by_id(tokenizer)
        longest_first = sorted(map(re.escape, self.by_id.values()), key=len, reverse=True)
        self._names = re.compile("|".join(longest_first)) if longest_first else None

    def are_named_in(self, messages: Sequence[Message]) -> bool:
        return self._names is not None and any(map(self._names.search, texts_of(messages)))

    def quoted(self, messages: Sequence[Message]) -> tuple[list[Message], "Quotes"]:
        """The messages with a mark in the place of each name, to be rendered and then given to `encode`."""
        assert self._names is not None
        quotes = Quotes(*unused_characters("".join(texts_of(messages))))
        return [{key: self._names.sub(quotes.add, text) for key, text in one.items()} for one in messages], quotes

    def encode(self, text: str, quotes: "Quotes") -> list[int]:
        """A tokenizer cuts a text at control tokens first and treats what is between two of them by itself: only such a
        part with a mark in it is tokenized again, with what the mark stands for. Raises `CannotQuote`."""
        tokens: list[int] = []
        for part in self.parts(text):
            if part.is_control or not quotes.are_in(part.text):
                tokens += part.tokens
                continue
            if [token.id for token in self._tokens(part.text, is_plain=True)] != part.tokens:
                raise CannotQuote("it names a control token, which this tokenizer cannot tokenize as plain text")
            found = self._tokens(quotes.resolved(part.text), is_plain=True)
            if any(map(self._is_control, found)):
                raise CannotQuote("it names a control token, which this tokenizer always takes for one")
            tokens += [token.id for token in found]
        return tokens

    def parts(self, text: str) -> list[Part]:
        """Raises `CannotQuote` where the tokenizer does not say where tokens stand."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise CannotQuote("it names a control token, and the model's tokenizer does not say where tokens stand")
        parts: list[Part] = []
        start, between = 0, list[int]()
        for token in self._tokens(text):
            if not self._is_control(token):
                between.append(token.id)
                continue
            parts += [
                Part(text[start : token.start], between, start, False),
                Part(token.text, [token.id], token.start, True),
            ]
            start, between = token.start + len(token.text), []
        return [*parts, Part(text[start:], between, start, False)]

    def _tokens(self, text: str, is_plain: bool = False) -> list["Token"]:
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=is_plain
        )
        offsets = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [Token(token, text[begin:end], begin) for token, (begin, end) in offsets]

    def _is_control(self, token: "Token") -> bool:
        """Not an unknown character, though a tokenizer may have the token of one for a control token as well."""
        return token.text.strip() == self.by_id.get(token.id)


class Quotes:
    """What marks in a text stand for."""

    def __init__(self, left: str, right: str) -> None:
        self.left, self.right = left, right
        self._mark = re.compile(f"{left}(\\d+){right}")
        self._texts: list[str] = []

    def add(self, match: re.Match[str]) -> str:
        self._texts.append(match.group())
        return f"{self.left}{len(self._texts) - 1}{self.right}"

    def are_in(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def resolved(self, text: str) -> str:
        return self._mark.sub(lambda match: self._texts[int(match.group(1))], text)


def texts_of(messages: Sequence[Message]) -> list[str]:
    return [text for message in messages for text in message.values()]


def unused_characters(text: str) -> tuple[str, str]:
    """Two of Unicode's private characters that the text does not have."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)


def _by_id(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    marked = {id_: token.content for id_, token in added if token.special}
    return marked | {tokenizer.convert_tokens_to_ids(token): str(token) for token in tokenizer.all_special_tokens}
