"""A tokenizer's control tokens: where they are in a text, and how to keep text that only looks like one as text.

Control tokens are the tokens marked as special and those that the tokenizer names as its own. `<think>` of Qwen3 is
neither: it is an ordinary token, which a prompt may use.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple


class CannotEscape(ValueError):
    """A text contains a control token's name that this tokenizer cannot tokenize as plain text."""


class Piece(NamedTuple):
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

    def occur_in(self, value: Any) -> bool:
        """Whether a text of `value`, which may be nested as JSON is, contains the name of a control token."""
        return self._names is not None and any(map(self._names.search, texts_of(value)))

    def escape(self, value: Any) -> tuple[Any, "Placeholders"]:
        """Returns the value with a placeholder for each control token's name; render it, then call `encode`."""
        placeholders = Placeholders(*unused_characters("".join(texts_of(value))))
        escaped = _mapped(value, partial(self._names.sub, placeholders.add)) if self._names else value
        return escaped, placeholders

    def encode(self, text: str, placeholders: "Placeholders") -> list[Piece]:
        """A rendered text in pieces, with the original text in place of each placeholder.

        A tokenizer cuts a text at control tokens first and tokenizes each piece between them separately. So only the
        pieces that contain a placeholder are tokenized again. Raises `CannotEscape`.
        """
        return [
            piece._replace(tokens=self._restored(piece, placeholders)) if placeholders.occur_in(piece.text) else piece
            for piece in self.pieces(text)
        ]

    def _restored(self, piece: Piece, placeholders: "Placeholders") -> list[int]:
        if [token.id for token in self._tokens(piece.text, is_plain=True)] != piece.tokens:
            raise CannotEscape("it names a control token, which this tokenizer cannot tokenize as plain text")
        found = self._tokens(placeholders.restore(piece.text), is_plain=True)
        if any(map(self._is_control, found)):
            raise CannotEscape("it names a control token, which this tokenizer always takes for one")
        return [token.id for token in found]

    def pieces(self, text: str) -> list[Piece]:
        """Cuts the text at its control tokens. Raises `CannotEscape` if the tokenizer reports no offsets."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise CannotEscape("it names a control token, and the model's tokenizer does not report where tokens are")
        pieces: list[Piece] = []
        start, between = 0, list[int]()
        for token in self._tokens(text):
            if not self._is_control(token):
                between.append(token.id)
                continue
            pieces += [
                Piece(text[start : token.start], between, start, False),
                Piece(token.text, [token.id], token.start, True),
            ]
            start, between = token.start + len(token.text), []
        return [*pieces, Piece(text[start:], between, start, False)]

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


def tokens_of(pieces: Iterable[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def texts_of(value: Any) -> Iterator[str]:
    """All texts of a value that is nested as JSON is, the names of its fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(inner, change) for name, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


def unused_characters(text: str) -> tuple[str, str]:
    """Two characters of Unicode's private use area that do not occur in the text."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)


def _by_id(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    marked = {id_: token.content for id_, token in added if token.special}
    return marked | {tokenizer.convert_tokens_to_ids(token): str(token) for token in tokenizer.all_special_tokens}
