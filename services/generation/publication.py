"""The newest weight version as the learner has published it: what Redis says of it, and its bytes over HTTP.

The bytes are verified against the manifest, and the manifest against the SHA-256 in Redis. Whatever is wrong with
either is a `WeightsError` that says so.
"""

import asyncio
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import redis.asyncio

from common.weights import MANIFEST_FILE, MODEL_FILE, WeightsError, decode_manifest, verify

FETCH_DEADLINE_S = 600.0
READ_TIMEOUT_S = 30.0
MAX_TOLD_CHARS = 500
_FIELDS = ("version", "sha256", "url")


class Published(NamedTuple):
    """What Redis says of the newest version."""

    version: int
    sha256: str
    url: str


async def newest_version(client: redis.asyncio.Redis, key: str) -> Published | None:
    """None before the first version, and after a Redis that lost it."""
    values = await client.hmget(key, _FIELDS)
    if not any(values):
        return None
    fields = {name: (value or b"").decode(errors="replace") for name, value in zip(_FIELDS, values, strict=True)}
    if not re.fullmatch("[1-9][0-9]{0,15}", fields["version"]) or not fields["sha256"] or not fields["url"]:
        told = str(fields)[:MAX_TOLD_CHARS]
        raise WeightsError(f"Redis says of the newest version {told}: expected a number, a SHA-256 and a URL")
    return Published(int(fields["version"]), fields["sha256"], fields["url"])


async def fetch(http: httpx.AsyncClient, published: Published, folder: Path, model_folder: Path) -> int:
    """The version in `folder`, verified, with what else an engine needs to start on it; how many bytes it has.

    Of a version that cannot be had nothing is left.
    """
    name = f"version {published.version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        async with asyncio.timeout(FETCH_DEADLINE_S):
            num_bytes = await _download(http, published, folder)
        _link_rest(model_folder, folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, TimeoutError):
            raise WeightsError(f"{name} did not arrive within {FETCH_DEADLINE_S:g} s") from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL | msgspec.MsgspecError | OSError):
            raise WeightsError(f"{name}: {type(error).__name__}: {error}") from error
        raise
    return num_bytes


async def _download(http: httpx.AsyncClient, published: Published, folder: Path) -> int:
    place = f"{published.url}/weights/{published.version}"
    response = await http.get(f"{place}/{MANIFEST_FILE}")
    manifest = decode_manifest(response.raise_for_status().content, published.sha256)
    for name in manifest.files:
        async with http.stream("GET", f"{place}/{name}") as stream:
            stream.raise_for_status()
            with (folder / name).open("wb") as file:
                async for chunk in stream.aiter_bytes(1 << 20):
                    file.write(chunk)
    await asyncio.to_thread(verify, folder, manifest)
    return manifest.num_bytes


def _link_rest(model_folder: Path, folder: Path) -> None:
    """The configuration and the tokenizer, which no version brings."""
    for path in model_folder.iterdir():
        is_weights = path.suffix in (".safetensors", ".bin") or path.name == f"{MODEL_FILE}.index.json"
        if path.is_file() and not is_weights:
            (folder / path.name).symlink_to(path.resolve())
