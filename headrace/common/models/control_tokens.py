"""A tokenizer's control tokens: where they are in a text, and how to keep text that only looks like one as text.

Control tokens are the tokens marked as special and those that the tokenizer names as its own. `<think>` of Qwen3 is
neither: it is an ordinary token, which a prompt may use.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.common.wire import Message


class CannotEscape(ValueError):
    """A text contains a control token's name that this tokenizer cannot tokenize as plain text."""


class Segment(NamedTuple):
    """A control token, or the text between two of them."""

    text: str
    tokens: list[int]
    start: int
    """Index of the first character in the whole text."""
    is_control: bool


class Token(NamedTuple):
    id: int
    text: str
    """The part of the input that it stands for."""
    start: int


class ControlTokens:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.by_id = _by_id(tokenizer)
        longest_first = sorted(map(re.escape, self.by_id.values()), key=len, reverse=True)
        self._names = re.compile("|".join(longest_first)) if longest_first else None

    def occur_in(self, messages: Sequence[Message]) -> bool:
        return self._names is not None and any(map(self._names.search, message_texts(messages)))

    def escape(self, messages: Sequence[Message]) -> tuple[list[Message], "Placeholders"]:
        """Returns the messages with a placeholder for each control token's name; render them, then call `encode`."""
        assert self._names is not None
        placeholders = Placeholders(*unused_characters("".join(message_texts(messages))))
        escaped = [{key: self._names.sub(placeholders.add, text) for key, text in one.items()} for one in messages]
        return escaped, placeholders

    def encode(self, text: str, placeholders: "Placeholders") -> list[int]:
        """The token ids of a rendered text, with the original text in place of each placeholder.

        A tokenizer cuts a text at control tokens first and tokenizes each segment between them separately. So only the
        segments that contain a placeholder are tokenized again. Raises `CannotEscape`.
        """
        tokens: list[int] = []
        for segment in self.segments(text):
            if segment.is_control or not placeholders.occur_in(segment.text):
                tokens += segment.tokens
                continue
            if [token.id for token in self._tokens(segment.text, is_plain=True)] != segment.tokens:
                raise CannotEscape("it names a control token, which this tokenizer cannot tokenize as plain text")
            found = self._tokens(placeholders.restore(segment.text), is_plain=True)
            if any(map(self._is_control, found)):
                raise CannotEscape("it names a control token, which this tokenizer always takes for one")
            tokens += [token.id for token in found]
        return tokens

    def segments(self, text: str) -> list[Segment]:
        """Cuts the text at its control tokens. Raises `CannotEscape` if the tokenizer reports no offsets."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise CannotEscape("it names a control token, and the model's tokenizer does not report where tokens are")
        segments: list[Segment] = []
        start, between = 0, list[int]()
        for token in self._tokens(text):
            if not self._is_control(token):
                between.append(token.id)
                continue
            segments += [
                Segment(text[start : token.start], between, start, False),
                Segment(token.text, [token.id], token.start, True),
            ]
            start, between = token.start + len(token.text), []
        return [*segments, Segment(text[start:], between, start, False)]

    def _tokens(self, text: str, is_plain: bool = False) -> list["Token"]:
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=is_plain
        )
        offsets = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [Token(token, text[begin:end], begin) for token, (begin, end) in offsets]

    def _is_control(self, token: "Token") -> bool:
        """False for an unknown character, although its token may be a control token as well."""
        return token.text.strip() == self.by_id.get(token.id)


class Placeholders:
    """The texts that placeholders stand for; a placeholder is a number between two unused characters."""

    def __init__(self, left: str, right: str) -> None:
        self.left, self.right = left, right
        self._pattern = re.compile(f"{left}(\\d+){right}")
        self._texts: list[str] = []

    def add(self, match: re.Match[str]) -> str:
        self._texts.append(match.group())
        return f"{self.left}{len(self._texts) - 1}{self.right}"

    def occur_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def restore(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._texts[int(match.group(1))], text)


def message_texts(messages: Sequence[Message]) -> list[str]:
    return [text for message in messages for text in message.values()]


def unused_characters(text: str) -> tuple[str, str]:
    """Two characters of Unicode's private use area that do not occur in the text."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)


def _by_id(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    marked = {id_: token.content for id_, token in added if token.special}
    return marked | {tokenizer.convert_tokens_to_ids(token): str(token) for token in tokenizer.all_special_tokens}
