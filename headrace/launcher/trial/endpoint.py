"""A model behind an OpenAI-compatible endpoint: its base URL and its name there."""

import os
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from headrace.common.http.addresses import bearer_header
from headrace.common.process.redaction import redact_url_passwords

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 10.0
MAX_NAMED = 8


class Endpoint(NamedTuple):
    base_url: str
    """As OpenAI's clients take it, such as `http://127.0.0.1:8000/v1`."""
    model: str


def find_endpoint(url: str, model: str | None) -> Endpoint:
    """Without a path, `url` means its `/v1`; without `model`, the endpoint's only one. Raises `ValueError`."""
    parts, shown = urlsplit(url), redact_url_passwords(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--url {shown!r}: expected the URL of an OpenAI-compatible endpoint, http://host:port/v1")
    base_url = url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
    key = os.environ.get(KEY_VARIABLE)
    try:
        answer = httpx.get(f"{base_url}/models", headers=bearer_header(key) if key else {}, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise ValueError(f"--url {shown!r} does not answer: {type(error).__name__}: {error}") from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ValueError(f"--url {shown!r} answered {answer.status_code}; expected its key in {KEY_VARIABLE}")
    names = _names(answer)
    if model is None and len(names) != 1:
        found = f"it has {', '.join(names[:MAX_NAMED])}{', …' * (len(names) > MAX_NAMED)}" if names else "it lists none"
        raise ValueError(f"--url {shown!r}: expected --model with the name of a model there; {found}")
    return Endpoint(base_url, model or names[0])


def _names(answer: httpx.Response) -> list[str]:
    """The names of the models; empty if the endpoint does not list them."""
    try:
        listed: Any = answer.json()["data"]
        return [str(one["id"]) for one in listed]
    except (ValueError, KeyError, TypeError):
        return []
