"""Texts as they may be shown."""

import re


def redact_url_passwords(text: str) -> str:
    """Passwords in URLs are left out."""
    return re.sub(r"(://[^/@\s]*:)[^/@\s]*@", r"\1...@", text)


def printable(text: str) -> str:
    """Without what a terminal would obey: completions are anybody's text."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)
