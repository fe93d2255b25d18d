"""Addresses of the services: listening sockets, free ports, URLs. Imports no web framework: commands start fast."""

import os
import socket
from typing import Protocol

ADVERTISED_HOST_VARIABLE = "HEADRACE_ADVERTISED_HOST"
"""Variable with the host name or address to advertise, where host names do not resolve everywhere (Kubernetes pods)."""


def bearer_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free port. Raises `ValueError` if the address is not available.

    The protocol is named because asyncio turns off the delay of small writes (TCP_NODELAY) only where it is: with the
    delay each response took 40 ms.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


class ListenAddress(Protocol):
    """The configured address of a service."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


def listen_with_overrides(configured: ListenAddress, host: str | None, port: int | None) -> socket.socket:
    """Listens at the configured address; a given host or port takes precedence."""
    return listen(configured.host if host is None else host, configured.port if port is None else port)


def free_port() -> int:
    """A free port on loopback, for a server that cannot take over a socket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def socket_url(sock: socket.socket) -> str:
    """The URL by which other services reach the socket.

    Its host is the socket's address; if that is 0.0.0.0, HEADRACE_ADVERTISED_HOST, else this machine's host name.
    """
    return advertised_url(*sock.getsockname()[:2])


def advertised_url(host: str, port: int) -> str:
    if host == "0.0.0.0":
        host = os.environ.get(ADVERTISED_HOST_VARIABLE) or socket.gethostname()
    return f"http://{host}:{port}"
