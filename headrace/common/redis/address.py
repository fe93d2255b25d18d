"""Redis URLs, and clients for them: of one server, or of the master that Sentinels name at every connect.

    redis://user:password@host:6379/0        rediss:// with TLS, such as ?ssl_ca_certs=/path        unix:///path
    redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0        rediss+sentinel:// with TLS to all of them

The Sentinels' own password is `?sentinel_password=…`. With `is_one_master` a client raises `MasterChanged` after a
failover, because the new master may lack the latest writes. Nothing here connects, and no error contains a password.
"""

from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

SENTINEL = "+sentinel"
SENTINEL_PORT = 26379
SENTINEL_TIMEOUT_S = 2.0
EXPECTED_URL = (
    "the URL of Redis cannot be read: expected redis://:password@host:port/db, rediss://, unix:///path or"
    " redis+sentinel://:password@host:port,host:port/master/db, with the special characters of the password"
    " percent-encoded"
)


class MasterChanged(redis.RedisError):  # type: ignore[misc]  # untyped there
    """Sentinels have made another server the master.

    Replication is asynchronous, so the last writes that the previous master acknowledged may be lost.
    """


class Address(NamedTuple):
    """A parsed URL; `options` are the arguments of redis-py's connection."""

    options: dict[str, Any]
    server: str
    """Host and port, or path, for messages."""
    master: str = ""
    """The master's name at the Sentinels; empty without Sentinels."""
    sentinels: tuple[tuple[str, int], ...] = ()

    @property
    def password(self) -> str:
        found: str = self.options.get("password", "")
        return found


def parse_address(url: str) -> Address:
    """Raises `ValueError` with the expected forms."""
    try:
        parts = urlsplit(url)
        if parts.scheme.endswith(SENTINEL):
            return _sentinels(url)
        options: dict[str, Any] = parse_url(url)
    except ValueError:  # its text may hold a part of the password
        raise ValueError(EXPECTED_URL) from None
    return Address(options, options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


def make_client(url: str, *, is_one_master: bool = False, **settings: Any) -> redis.Redis:
    """With `is_one_master`, a connection to another master than the first connection's raises `MasterChanged`."""
    address = parse_address(url)
    if not address.master:
        return redis.Redis.from_url(url, **settings)
    for_sentinels = _for_sentinels(address) | {"retry": Retry(NoBackoff(), 0)}
    sentinels = redis.sentinel.Sentinel(address.sentinels, sentinel_kwargs=for_sentinels)
    client = sentinels.master_for(address.master, **_for_master(address), **settings)
    pool, asks = client.connection_pool, _PinsMaster if is_one_master else _RediscoversMaster
    pool.connection_class = type("Connection", (asks, pool.connection_class), {"first": []})
    return client


class _RediscoversMaster:
    """Like `_RediscoversMasterAsync`, for connections of threads."""

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if retry_socket_connect:
            self.connect()  # type: ignore[attr-defined]
        else:
            super().connect_check_health(check_health, retry_socket_connect)  # type: ignore[misc]


class _PinsMaster(_RediscoversMaster):
    """Mixin for a connection to a master. `first`: the address of the client's first connection."""

    first: list[tuple[str, int]]

    def connect_to(self, address: tuple[str, int]) -> None:
        if self.first and address != self.first[0]:
            before, now = (":".join(map(str, place)) for place in (self.first[0], address))
            raise MasterChanged(f"the master of Redis was {before} and is {now}: what was written last may be lost")
        super().connect_to(address)  # type: ignore[misc]
        if not self.first:
            self.first.append(address)


def make_async_client(url: str, **settings: Any) -> redis.asyncio.Redis:
    address = parse_address(url)
    if not address.master:
        return redis.asyncio.Redis.from_url(url, **settings)
    for_sentinels = _for_sentinels(address) | {"retry": redis.asyncio.retry.Retry(NoBackoff(), 0)}
    sentinels = redis.asyncio.sentinel.Sentinel(address.sentinels, sentinel_kwargs=for_sentinels)
    client: redis.asyncio.Redis = sentinels.master_for(address.master, **_for_master(address), **settings)
    pool = client.connection_pool
    pool.connection_class = type("Connection", (_RediscoversMasterAsync, pool.connection_class), {})
    return client


class _RediscoversMasterAsync:
    """Mixin for a connection to a master: asks the Sentinels at every connect; redis-py would reuse the old address."""

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if retry_socket_connect:
            await self.connect()  # type: ignore[attr-defined]
        else:
            await super().connect_check_health(check_health, retry_socket_connect)  # type: ignore[misc]


def _sentinels(url: str) -> Address:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    master, _, db = parts.path.strip("/").partition("/")
    if not master or not hosts:
        raise ValueError
    sentinels = tuple(_host_and_port(host) for host in hosts.split(","))
    scheme = parts.scheme.removesuffix(SENTINEL)
    netloc = f"{credentials}@localhost" if credentials else "localhost"
    options = parse_url(urlunsplit((scheme, netloc, f"/{db}", parts.query, "")))
    options.pop("host")
    if scheme == "rediss":
        options.pop("connection_class")
        options["ssl"] = True
    return Address(options, f"master {master} of {hosts}", master, sentinels)


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError
    return parts.hostname, parts.port or SENTINEL_PORT


def _for_master(address: Address) -> dict[str, Any]:
    return {name: value for name, value in address.options.items() if name != "sentinel_password"}


def _for_sentinels(address: Address) -> dict[str, Any]:
    options = {name: value for name, value in address.options.items() if name.startswith("ssl")}
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT_S, "socket_connect_timeout": SENTINEL_TIMEOUT_S}
    return options | timeouts | {"password": address.options.get("sentinel_password")}
