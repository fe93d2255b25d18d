"""Texts as they may be shown."""

import re


def without_password(text: str) -> str:
    """Passwords in URLs are left out."""
    return re.sub(r"(://[^/@\s]*:)[^/@\s]*@", r"\1...@", text)
