"""The texts of a completion's tokens.

Joined, they are its text: a token that ends inside a character has an empty text, and the one that completes it has all
of it.
"""

from collections.abc import Sequence
from typing import Any

LONGEST_CHARACTER_TOKENS = 4
"""A character has at most 4 bytes in UTF-8."""
_HALF = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """The text of each token of a completion, by the model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        texts = [self._text_alone(token) for token in tokens]
        return texts if "".join(texts) == self.joined(tokens) else self._in_context(tokens)

    def joined(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _text_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self.joined([token])
        return self._alone[token]

    def _in_context(self, tokens: Sequence[int]) -> list[str]:
        """Each token's text is what it adds to the text before it."""
        texts = []
        first = done = 0
        for end in range(1, len(tokens) + 1):
            before, text = self.joined(tokens[first:done]), self.joined(tokens[first:end])
            if text.endswith(_HALF) and end < len(tokens) and end - done < LONGEST_CHARACTER_TOKENS:
                texts.append("")
                continue
            texts.append(text[len(before) :])
            first, done = done, end
        return texts
