"""The run's token: where it is read from, and which texts are valid. No error and no log line contains it.

It is read from HEADRACE_TOKEN, else from a file. White space around it, such as the line break that an editor or `echo`
adds, is removed.
"""

import os
import re
import secrets
from pathlib import Path

from headrace.common.process.logs import redact

TOKEN_VARIABLE = "HEADRACE_TOKEN"
MAX_CHARS = 4096
_VISIBLE = re.compile(rf"[!-~]{{1,{MAX_CHARS}}}")
"""Characters that an HTTP header carries unchanged."""


def token_from_environment() -> str | None:
    """The token in HEADRACE_TOKEN; None if that is empty or not set. Raises `ValueError` if it is invalid."""
    given = os.environ.get(TOKEN_VARIABLE)
    return _checked(given, f"the variable {TOKEN_VARIABLE}") if given else None


def read_token_file(path: Path) -> str | None:
    """The token in the file; None without a file. Raises `ValueError` if it cannot be read or is invalid."""
    try:
        return _checked(path.read_bytes().decode(errors="replace"), f"the file {path}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"the token's file {path} cannot be read: {error.strerror}") from error


def load_or_create_token(path: Path) -> str:
    """The token in HEADRACE_TOKEN, else the one in `path`, which is created if necessary, with mode 600."""
    if found := token_from_environment() or read_token_file(path):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    aside.rename(path)  # so that no reader sees a partial file
    found = read_token_file(path)
    assert found is not None, path
    return found


def _checked(text: str, origin: str) -> str:
    token = text.strip()
    if not _VISIBLE.fullmatch(token):
        signs = f"up to {MAX_CHARS} visible ASCII characters, as in runs/NAME/token"
        found = "other characters or more of them" if token else "only white space"
        raise ValueError(f"{origin} has {found}: expected the run's token, {signs}")
    redact(token)
    return token
