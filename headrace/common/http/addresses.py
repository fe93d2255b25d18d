"""Addresses of the services: listening sockets, free ports, URLs. Imports no web framework: commands start fast."""

import os
import socket
from typing import Protocol

ADVERTISED_HOST_VARIABLE = "HEADRACE_ADVERTISED_HOST"
"""Where host names do not resolve everywhere, as those of Kubernetes' pods."""


def bearer_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ValueError` if the address cannot be had."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


class ListenAddress(Protocol):
    """Where a service listens, as configured."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


def listen_with_overrides(configured: ListenAddress, host: str | None, port: int | None) -> socket.socket:
    """Listens where configured, except that a given host or port takes precedence."""
    return listen(configured.host if host is None else host, configured.port if port is None else port)


def free_port() -> int:
    """On loopback, for a server that cannot be handed a socket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def socket_url(sock: socket.socket) -> str:
    """How others reach the socket: its address; where it listens on all of them, what HEADRACE_ADVERTISED_HOST says,
    else this host's name."""
    return advertised_url(*sock.getsockname()[:2])


def advertised_url(host: str, port: int) -> str:
    if host == "0.0.0.0":
        host = os.environ.get(ADVERTISED_HOST_VARIABLE) or socket.gethostname()
    return f"http://{host}:{port}"
