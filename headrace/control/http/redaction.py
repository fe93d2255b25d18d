"""Hides everything in a configuration that could be a secret."""

import re
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(pass(word|wd|phrase)?|secret|token|api[-_]?key|access[-_]?key|credential|auth)s?$", re.IGNORECASE
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def redact_secrets(settings: Any, name: str = "") -> Any:
    """Hides strings whose name suggests a secret, and credentials in URLs."""
    if isinstance(settings, dict):
        return {key: redact_secrets(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_redact_item(settings, index, name) for index in range(len(settings))]
    if isinstance(settings, str):
        return HIDDEN if _NAMES.search(name) else _IN_URL.sub(f"{HIDDEN}@", settings)
    return settings


def _redact_item(values: list[Any], index: int, name: str) -> Any:
    """In a command line an argument is named by itself (`--x=y`) or by the argument before it."""
    value, before = values[index], values[index - 1] if index else ""
    if isinstance(value, str) and value.startswith("-"):
        flag, is_assigned, assigned = value.partition("=")
        return f"{flag}={redact_secrets(assigned, flag)}" if is_assigned else value
    is_flag = isinstance(before, str) and before.startswith("-") and "=" not in before
    return redact_secrets(value, before if is_flag else name)
