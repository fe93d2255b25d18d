"""Asks a replica to drain: at its own address, with the token of the run and a deadline."""

import asyncio

import httpx

from headrace.common.http.addresses import bearer_header
from headrace.common.wire.checks import is_url

DRAIN_DEADLINE_S = 5.0


class DrainFailed(RuntimeError):
    """The replica has not accepted the request."""


async def drain(client: httpx.AsyncClient, url: str, token: str) -> None:
    if not is_url(url):
        raise DrainFailed(f"the replica's address {url!r} is not a URL")
    try:
        async with (
            asyncio.timeout(DRAIN_DEADLINE_S),
            client.stream("POST", f"{url}/drain", headers=bearer_header(token)) as got,
        ):
            status = got.status_code
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise DrainFailed(f"the replica does not answer ({type(error).__name__})") from error
    if status != 200:
        raise DrainFailed(f"the replica responded with HTTP {status}")
