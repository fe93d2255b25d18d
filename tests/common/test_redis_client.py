"""Connections to Redis under every fault: real servers that are killed, frozen, full, read-only or behind a proxy."""

import asyncio
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.common.http.addresses import free_port
from headrace.common.process.waiting import Reason, Waits
from headrace.common.redis.client import connect, connect_async, durability_problem
from headrace.launcher.run.processes import Service
from headrace.launcher.run.redis_server import redis_binary
from tests.support.guard import GUARD_S

PASSWORD = "pa@ss/w:rd#"
IN_URL = "pa%40ss%2Fw%3Ard%23"
UNREACHABLE, REFUSES = Reason.REDIS_UNREACHABLE, Reason.REDIS_REFUSING


class Seen(Waits):
    """Tells a test that a wait has begun, and keeps every detail it had."""

    def __init__(self) -> None:
        super().__init__()
        self.details: dict[Reason, list[str]] = {UNREACHABLE: [], REFUSES: []}
        self._said = threading.Condition()

    def note(self, reason: Reason, detail: str = "", deadline_s: float | None = None) -> float:
        lasted_s = super().note(reason, detail, deadline_s)
        with self._said:
            self.details[reason].append(detail)
            self._said.notify_all()
        return lasted_s

    def until(self, reason: Reason, words: str = "") -> str:
        def said() -> str | None:
            return next((detail for detail in self.details[reason] if words in detail), None)

        with self._said:
            detail = self._said.wait_for(said, GUARD_S)
        assert detail is not None, f"expected a wait that says {words!r}, saw {self.describe()}"
        return detail

    def nothing_ever(self) -> bool:
        return not any(self.details.values()) and not self.status()


class Server:
    def __init__(self, folder: Path, settings: dict[str, str], password: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        self.password = password
        self.settings = {
            "port": str(self.port), "bind": "127.0.0.1", "dir": str(folder), "save": "", "appendonly": "yes",
            "appendfsync": "always", "unixsocket": str(folder / "socket"), **settings,
        }  # fmt: skip
        if password:
            self.settings["requirepass"] = password
        self.url = f"redis://:{IN_URL if password else ''}@127.0.0.1:{self.port}"
        self.admin = connect(f"{self.url}?protocol=2")
        self.start()

    def start(self, **settings: str) -> None:
        arguments = [
            part for key, value in {**self.settings, **settings}.items() for part in (f"--{key}", *value.split(" "))
        ]
        self.service = Service("redis", [redis_binary(), *arguments], self.folder / "redis.log")

    def kill(self) -> None:
        self.service.process.kill()
        self.service.process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


StartServer = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartServer]:
    servers: list[Server] = []

    def started(password: str = "", **settings: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, {key.replace("_", "-"): value for key, value in settings.items()}, password))
        servers[-1].admin.ping()
        return servers[-1]

    yield started
    for server in servers:
        server.admin.close()
        server.kill()


@pytest.fixture
def server(start: StartServer) -> Server:
    return start()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


@pytest.fixture
def waits() -> Seen:
    return Seen()


class Proxy:
    """In front of a server, in a thread of its own: ends TLS, and can turn to another server."""

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(GUARD_S)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target_port)
        await asyncio.gather(_pump(reader, to_server), _pump(from_server, writer))

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(GUARD_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while received := await reader.read(65536):
            writer.write(received)
            await writer.drain()
    writer.close()


async def asked_async(url: str, waits: Waits, *command: Any, deadline_s: float = GUARD_S) -> Any:
    client = connect_async(url, waits, deadline_s=deadline_s)
    try:
        return await client.execute_command(*command)
    finally:
        await client.aclose()


def error_of(call: Callable[[], object]) -> tuple[Exception, float]:
    """What it raises, after how many seconds."""
    started = time.monotonic()
    with pytest.raises((redis.RedisError, OSError)) as caught:
        call()
    return caught.value, time.monotonic() - started


# Addresses, passwords, TLS


def test_a_password_in_the_url_opens_and_a_wrong_one_raises_at_once_unseen(start: StartServer, waits: Seen) -> None:
    server = start(PASSWORD)
    without_hello = start(**{"rename-command": "HELLO HULLO"})  # its error repeats the arguments
    unix = f"unix://{server.folder / 'socket'}?password="
    for url in (f"{server.url}/3", unix + IN_URL):
        assert connect(url).set("key", "value") and asyncio.run(asked_async(url, waits, "GET", "key")) == b"value"
    for url, word in (
        (server.url.replace(IN_URL, "s3cret"), "invalid username-password pair"),
        (unix + "s3cret", "invalid username-password pair"),
        (f"redis://127.0.0.1:{server.port}", "must be called with the client already authenticated"),
        (without_hello.url.replace("@", f"{IN_URL}@"), "unknown command"),
    ):
        for call in (connect(url, waits).ping, lambda url=url: asyncio.run(asked_async(url, waits, "PING"))):
            error, _ = error_of(call)
            assert word in str(error)
            assert "s3cret" not in f"{error!r} {error}" and PASSWORD not in f"{error!r} {error}"
    assert waits.nothing_ever()


def test_a_url_that_cannot_be_read_is_named_without_its_password() -> None:
    for url in ("redis://:s3cret/word@host:1", "http://:s3cret@host"):
        with pytest.raises(ValueError, match="expected redis://") as caught:
            connect(url)
        assert "s3cret" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    both = tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", both, "-out", tmp_path / "crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(both.read_bytes() + (tmp_path / "crt").read_bytes())
    return both


def test_tls(start: StartServer, certificate: Path, waits: Seen) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    proxy = Proxy(start(PASSWORD).port, tls)
    url = f"rediss://:{IN_URL}@127.0.0.1:{proxy.port}"
    trusting = f"{url}?ssl_ca_certs={certificate}"
    try:
        with connect(trusting, waits) as client:
            assert client.set("key", "value")
        assert asyncio.run(asked_async(trusting, waits, "GET", "key")) == b"value"
        for call in (lambda: connect(url, waits).ping(), lambda: asyncio.run(asked_async(url, waits, "PING"))):
            error, _ = error_of(call)
            assert "CERTIFICATE_VERIFY_FAILED" in str(error)
        assert waits.nothing_ever()
    finally:
        proxy.close()


# The server is away


def test_a_command_outlives_a_killed_server_that_starts_slowly(
    start: StartServer, waits: Seen, threads: ThreadPoolExecutor
) -> None:
    server = start(PASSWORD, rdbcompression="no")
    client = connect(server.url, waits)
    client.mset({f"ballast-{n}": b"x" * 1024 for n in range(40)})
    client.bgrewriteaof()
    until(lambda: not server.admin.info("persistence")["aof_rewrite_in_progress"])
    client.mset({"key-7": 7, "key-8": 8})
    server.kill()
    adding = threads.submit(client.incr, "key-7")
    adding_async = threads.submit(asyncio.run, asked_async(server.url, waits, "INCR", "key-8"))
    detail = waits.until(UNREACHABLE)
    assert detail.startswith(f"127.0.0.1:{server.port}: ") and PASSWORD not in detail
    assert [wait["reason"] for wait in waits.status()] == [UNREACHABLE.value]
    server.start(**{"key-load-delay": "50000", "loading-process-events-interval-bytes": "1024"})
    waits.until(UNREACHABLE, "loading its data")
    assert (adding.result(GUARD_S), adding_async.result(GUARD_S)) == (8, 9)
    assert waits.status() == [] and waits.details[REFUSES] == []


def test_a_frozen_server_is_noticed_and_outlived(server: Server, waits: Seen, threads: ThreadPoolExecutor) -> None:
    url = f"{server.url}?socket_timeout=0.3"
    client = connect(url, waits)
    client.ping()
    server.service.process.send_signal(signal.SIGSTOP)
    try:
        setting = threads.submit(client.set, "key", "value")
        setting_async = threads.submit(asyncio.run, asked_async(url, waits, "SET", "other", "value"))
        assert "Timeout reading" in waits.until(UNREACHABLE)
    finally:
        server.service.process.send_signal(signal.SIGCONT)
    assert setting.result(GUARD_S) and setting_async.result(GUARD_S)
    assert waits.status() == []


def test_the_deadline_is_of_the_outage_and_not_of_each_connection_or_command(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    server.kill()
    client = connect(server.url, deadline_s=1.0)
    errors = list(threads.map(lambda _: error_of(client.ping), range(4)))
    assert all(isinstance(error, redis.ConnectionError) and took_s > 0.9 for error, took_s in errors)
    client.connection_pool.reset()  # so that the next connection is another one
    assert error_of(client.ping)[1] < 0.9, "what winds up after the deadline must not wait for another one"
    error, took_s = error_of(lambda: asyncio.run(asked_async(server.url, Waits(), "PING", deadline_s=1.0)))
    assert isinstance(error, redis.ConnectionError) and took_s > 0.9
    with client.pipeline() as pipeline:
        assert error_of(pipeline.set("key", 1).execute)[1] < 0.9


def test_who_is_told_to_stop_retries_nothing(waits: Seen) -> None:
    told_in_the_pause, told_before = (False, True), (True,)
    for answers, num_waits in ((told_in_the_pause, 1), (told_before, 0)):
        stops = iter(answers)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.1"
            waits.details[UNREACHABLE].clear()
            error, _ = error_of(connect(url, waits, is_stopping=stops.__next__).ping)
            assert isinstance(error, redis.TimeoutError) and len(waits.details[UNREACHABLE]) == num_waits
            silent.accept()[0].close()
            silent.setblocking(False)
            with pytest.raises(BlockingIOError):
                silent.accept()
    assert waits.status() == [], "nobody waits any more"


def test_a_blocking_read_is_no_outage(redis_url: str, waits: Seen) -> None:
    with connect(redis_url, waits) as client:
        assert not client.xread({"nothing": "$"}, block=1000)
    assert not asyncio.run(asked_async(redis_url, waits, "XREAD", "BLOCK", 1000, "STREAMS", "nothing", "$"))
    assert waits.nothing_ever()


def test_an_outage_does_not_delay_a_cancellation(server: Server, waits: Seen) -> None:
    async def cancelled_after_s() -> float:
        task = asyncio.create_task(asked_async(server.url, waits, "PING"))
        await asyncio.to_thread(waits.until, UNREACHABLE)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    server.kill()
    assert asyncio.run(cancelled_after_s()) < 1
    assert waits.status() == []


def test_no_moment_of_a_command_swallows_a_cancellation(redis_url: str) -> None:
    """redis-py alone does, at the moments when it has just sent something."""

    async def cancel_after(num_turns: int) -> None:
        client = connect_async(redis_url)
        await client.ping()
        task = asyncio.create_task(client.blpop(["nothing"], timeout=60))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await client.echo("mine") == b"mine", "the connection carries on with another's answer"
        await client.aclose()

    for num_turns in range(12):
        asyncio.run(cancel_after(num_turns))


# The server refuses


def test_a_full_server_holds_writes_back_until_there_is_room(
    server: Server, waits: Seen, threads: ThreadPoolExecutor
) -> None:
    client = connect(server.url, waits)
    client.set("ballast", b"x" * 2**24)
    client.config_set("maxmemory", 2**23)
    writes = write_in_every_way(server.url, threads)
    for each, _ in writes:
        assert "command not allowed when used memory" in each.until(REFUSES)
    assert client.strlen("ballast") == 2**24 and waits.nothing_ever(), "reads go on"
    assert client.exists("script", "pipeline", "async", "other async") == 0
    client.delete("ballast")
    for each, write in writes:
        assert write.result(GUARD_S) and each.status() == [] and each.details[UNREACHABLE] == []
    assert client.mget("script", "pipeline", "async", "other async") == [b"1"] * 4, "each write has come once"


def write_in_every_way(url: str, threads: ThreadPoolExecutor) -> list[tuple[Seen, Future[Any]]]:
    """Each increments a key, with waits of its own."""

    def script(waits: Seen) -> Any:
        return connect(url, waits).register_script("return redis.call('INCR', KEYS[1])")(["script"])

    def pipeline(waits: Seen) -> Any:
        return connect(url, waits).pipeline().incr("pipeline").execute()

    async def in_event_loop(waits: Seen, key: str, transaction: bool) -> Any:
        client = connect_async(url, waits)
        async with client.pipeline(transaction) as pipeline:
            answer = await pipeline.incr(key).execute()
        await client.aclose()
        return answer

    ways = [
        script,
        pipeline,
        lambda waits: asyncio.run(in_event_loop(waits, "async", True)),
        lambda waits: asyncio.run(in_event_loop(waits, "other async", False)),
    ]
    return [(waits, threads.submit(way, waits)) for way in ways for waits in [Seen()]]


def test_a_refusal_has_the_deadline_too_and_each_its_own(
    server: Server, waits: Seen, threads: ThreadPoolExecutor
) -> None:
    client = connect(server.url, waits, deadline_s=2.0)
    server.admin.config_set("maxmemory", 1)
    writing = threads.submit(client.set, "key", 1)
    waits.until(REFUSES)
    server.admin.config_set("maxmemory", 0)
    assert writing.result(GUARD_S) and waits.status() == []
    server.admin.config_set("maxmemory", 1)
    for call in (
        lambda: client.set("key", 2),
        lambda: asyncio.run(asked_async(server.url, waits, "SET", "key", 2, deadline_s=2.0)),
    ):
        error, took_s = error_of(call)
        assert isinstance(error, redis.OutOfMemoryError) and took_s > 1.9 and waits.status() == []


def test_a_replica_is_left_for_the_new_master_behind_the_same_address(
    start: StartServer, waits: Seen, threads: ThreadPoolExecutor
) -> None:
    replica, master = start(replicaof=f"127.0.0.1 {free_port()}"), start()
    proxy = Proxy(replica.port)
    url = f"redis://127.0.0.1:{proxy.port}"
    try:
        writing = threads.submit(connect(url, waits).set, "key", 1)
        writing_async = threads.submit(asyncio.run, asked_async(url, waits, "SET", "other", 1))
        assert "read only replica" in waits.until(REFUSES)
        proxy.target_port = master.port
        assert writing.result(GUARD_S) and writing_async.result(GUARD_S)
        assert master.admin.mget("key", "other") == [b"1", b"1"] and waits.status() == []
    finally:
        proxy.close()


@contextmanager
def no_replicas(server: Server) -> Iterator[None]:
    server.admin.config_set("min-replicas-to-write", 1)
    yield
    server.admin.config_set("min-replicas-to-write", 0)


@contextmanager
def no_disk(server: Server) -> Iterator[None]:
    server.admin.config_set("save", "3600 1")
    shutil.rmtree(server.folder)
    server.admin.bgsave()
    until(lambda: server.admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    server.admin.config_set("stop-writes-on-bgsave-error", "no")


@contextmanager
def no_master(server: Server) -> Iterator[None]:
    server.admin.config_set("replica-serve-stale-data", "no")
    server.admin.replicaof("127.0.0.1", free_port())
    yield
    server.admin.replicaof("NO", "ONE")


@contextmanager
def endless_script(server: Server) -> Iterator[None]:
    def is_busy() -> bool:
        try:
            return not redis.Redis.from_url(server.url).ping()
        except redis.ResponseError:
            return True

    server.admin.config_set("busy-reply-threshold", 1)
    with ThreadPoolExecutor() as threads:
        killed = threads.submit(error_of, lambda: connect(server.url).eval("while true do end", 0))
        until(is_busy)
        yield
        server.admin.script_kill()
        assert "killed" in str(killed.result(GUARD_S)[0]).lower()


@pytest.mark.parametrize(
    ("refusing", "words"),
    [
        (no_replicas, "NOREPLICAS"),
        (no_disk, "MISCONF"),
        (no_master, "Link with MASTER is down|You can't write against a read only replica"),
        (endless_script, "BUSY"),
    ],
)
def test_a_refusal_that_passes_is_waited_for(
    server: Server,
    threads: ThreadPoolExecutor,
    refusing: Callable[[Server], AbstractContextManager[None]],
    words: str,
) -> None:
    server.admin.script_load("return redis.call('INCR', KEYS[1])")
    with refusing(server):
        writes = write_in_every_way(server.url, threads)
        details = [each.until(REFUSES) for each, _ in writes]
    for each, write in writes:
        assert write.result(GUARD_S) and each.status() == []
    assert all(re.match(rf"127.0.0.1:{server.port}: ({words})", detail) for detail in details), details


def test_a_blocked_read_outlives_the_fall_of_its_master(
    server: Server, waits: Seen, threads: ThreadPoolExecutor
) -> None:
    reading = threads.submit(connect(server.url, waits).xread, {"stream": "0"}, None, 60_000)
    until(lambda: server.admin.info("clients")["blocked_clients"] == 1)
    server.admin.replicaof("127.0.0.1", free_port())
    waits.until(REFUSES, "UNBLOCKED")
    server.admin.replicaof("NO", "ONE")
    server.admin.xadd("stream", {"field": "value"})
    assert reading.result(GUARD_S) and waits.status() == []


@pytest.mark.parametrize("word", ["WRONGTYPE", "NOGROUP", "FENCED", "NOPERM"])
def test_a_no_that_time_does_not_mend_is_raised_at_once(server: Server, waits: Seen, word: str) -> None:
    calls: dict[str, tuple[Any, ...]] = {
        "WRONGTYPE": ("INCRBY", "list", 1),
        "NOGROUP": ("XREADGROUP", "GROUP", "group", "consumer", "STREAMS", "list", ">"),
        "FENCED": ("EVAL", "return redis.error_reply('FENCED by a newer learner')", 0),
        "NOPERM": ("CONFIG", "GET", "save"),
    }
    server.admin.rpush("list", "element")
    if word == "NOGROUP":
        server.admin.delete("list")
    server.admin.acl_setuser(
        "default", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-config"]
    )
    for call in (
        lambda: connect(server.url, waits).execute_command(*calls[word]),
        lambda: asyncio.run(asked_async(server.url, waits, *calls[word])),
    ):
        error, _ = error_of(call)
        assert word in str(error) or isinstance(error, redis.exceptions.NoPermissionError)
    assert waits.nothing_ever()


def test_a_script_that_the_server_has_lost_is_loaded_again(server: Server, waits: Seen) -> None:
    client = connect(server.url, waits)
    script = client.register_script("return 7")
    assert script() == 7
    server.admin.script_flush()
    assert script() == 7 and waits.nothing_ever()


def test_durability_is_unknown_where_config_may_not_be_read(redis_url: str, server: Server) -> None:
    assert durability_problem(connect(redis_url)) is None
    server.admin.config_set("maxmemory-policy", "allkeys-lru")
    problem = durability_problem(connect(server.url))
    assert problem == "maxmemory-policy is 'allkeys-lru', expected 'noeviction'"
    server.admin.acl_setuser(
        "user", enabled=True, passwords=["+word"], keys=["*"], categories=["+@all"], commands=["-config"]
    )
    problem = durability_problem(connect(server.url.replace("redis://:", "redis://user:word")))
    assert problem is not None and "CONFIG cannot be read" in problem
