"""Texts made safe to show: without passwords and control characters."""

import re


def redact_url_passwords(text: str) -> str:
    """The text with `...` in place of passwords in URLs."""
    return re.sub(r"(://[^/@\s]*:)[^/@\s]*@", r"\1...@", text)


def printable(text: str) -> str:
    """The text with `�` in place of control characters, which a terminal would execute; completions are untrusted."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)
