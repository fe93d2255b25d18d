"""Redis that is not one plain process: masters behind Sentinels, a cluster's slots, runs that share a server."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from headrace.common.http.addresses import free_port
from headrace.common.process.waiting import Waits
from headrace.common.redis.address import parse_address
from headrace.common.redis.client import connect, connect_async
from headrace.common.redis.keys import Keys
from tests.support.redis_servers import Start, asked, servers, until

PASSWORD = "se%40cret"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with servers(tmp_path) as started:
        yield started


def test_a_master_is_asked_for_at_its_sentinels_and_followed_when_it_falls(start: Start, tmp_path: Path) -> None:
    guarded = {"requirepass": "se@cret", "masterauth": "se@cret"}
    master = start(**guarded)
    replica = start(replicaof=f"127.0.0.1 {master}", **guarded)
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master} 1\nsentinel auth-pass mymaster se@cret\n"
        "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 2000\n"
    )
    sentinel = start(str(configuration), "--sentinel")
    until(lambda: len(asked(sentinel, "SENTINEL", "REPLICAS", "mymaster")) == 1)
    url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:{free_port()},127.0.0.1:{sentinel}/mymaster/0"
    waits = Waits()
    client, loop = connect(url, waits), asyncio.Runner()
    async_client = connect_async(url, Waits())
    with loop, client:
        assert client.set("key", "before") and loop.run(async_client.get("key")) == b"before"
        until(lambda: asked(replica, "GET", "key", password="se@cret") == b"before")
        with suppress(redis.ConnectionError):
            asked(master, "SHUTDOWN", "NOSAVE", password="se@cret")
        assert client.set("key", "after"), "it waits until there is a master again"
        assert loop.run(async_client.get("key")) == b"after"
        assert asked(replica, "GET", "key", password="se@cret") == b"after" and waits.status() == []
        loop.run(async_client.aclose())


@pytest.mark.parametrize(
    ("url", "server", "sentinels"),
    [
        ("redis+sentinel://h1,h2:5/run", "master run of h1,h2:5", (("h1", 26379), ("h2", 5))),
        ("rediss+sentinel://u:p%40@[::1]:7/run/2", "master run of [::1]:7", (("::1", 7),)),
        ("redis://:p@h:1", "h:1", ()),
    ],
)
def test_urls(url: str, server: str, sentinels: tuple[tuple[str, int], ...]) -> None:
    address = parse_address(url)
    assert (address.server, address.sentinels) == (server, sentinels)
    assert "p" not in address.password or address.password in ("p@", "p")
    assert address.options.get("ssl", False) == url.startswith("rediss")


@pytest.mark.parametrize("url", ["redis+sentinel://:secret@host", "redis+sentinel:///secret", "http://secret"])
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="expected redis://") as refused:
        parse_address(url)
    assert "secret" not in str(refused.value)


def keys_of(keys: Keys) -> list[str]:
    return [value for value in vars(keys).values() if isinstance(value, str)] + [keys.replica("one")]


def test_all_keys_of_a_run_are_in_one_slot_of_a_cluster(start: Start) -> None:
    """A script or transaction over any of them is one that a cluster takes."""
    port = start(cluster_enabled="yes", cluster_port=str(free_port()))
    asked(port, "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
    until(lambda: b"cluster_state:ok" in asked(port, "CLUSTER", "INFO"))
    mine, other = keys_of(Keys("mine")), keys_of(Keys("other"))
    assert len(mine) > 15
    with redis.Redis(port=port) as client:
        assert client.eval("return #KEYS", len(mine), *mine) == len(mine)
        with pytest.raises(redis.ResponseError, match="slot"):
            client.eval("return #KEYS", 2, mine[0], other[0])


def test_runs_that_share_a_server_cannot_touch_each_other(start: Start) -> None:
    """By the users that docs/redis.md shows."""
    port = start()
    text = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("ACL SETUSER")]
    assert len(lines) == 2
    for line in lines:
        assert asked(port, *line.split()) == b"OK"
    with redis.Redis(port=port, username="demo", password="change-me") as client:
        assert client.hset(Keys("demo").control, "paused", "1") == 1
        assert client.config_get("appendonly")
        for call in (
            lambda: client.get(Keys("other").config),
            lambda: client.eval("return redis.call('DEL', KEYS[1])", 1, Keys("other").tickets),
            lambda: client.flushall(),
            lambda: client.config_set("appendonly", "no"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                call()  # type: ignore[no-untyped-call]
