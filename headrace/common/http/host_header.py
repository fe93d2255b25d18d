"""Protects services on loopback from DNS rebinding: rejects requests whose Host header is not a loopback name.

Otherwise a website whose name resolves to 127.0.0.1 could read the run through a visitor's browser.
"""

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.common.http.problems import problem_response

_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[^:]*)(:[0-9]{1,5})?")


class HostHeaderCheck:
    """ASGI middleware; answers 421 to other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not all(_is_local(host) for name, host in scope["headers"] if name == b"host"):
            await problem_response(421, "this service listens on loopback: address it as localhost or 127.0.0.1")(
                scope, receive, send
            )
            return
        await self.app(scope, receive, send)


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"


def _is_local(host: bytes) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].decode("latin-1").strip("[]"))
