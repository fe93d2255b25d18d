"""The kill matrix's own parts: its schedule, its proxy, its accounts, its eyes. No run is started here."""

import itertools
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from chaos.accounting import STUCK_AFTER_STEPS, Evidence, Violation, check, stuck_groups
from chaos.disk import is_readable, readable_checkpoints, truncate
from chaos.episodes.groups import GroupChecks
from chaos.launched import Launched
from chaos.matrix import Results
from chaos.observer import Observer
from chaos.proxy import Proxy
from chaos.report import problems, summarise
from chaos.schedule import EPISODE_KINDS, HOLD_S, KINDS, PARTS, Fault, Kind, schedule
from chaos.test_bed import InjectedFault
from headrace.common.process.atomic_files import file_entry
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, encode
from headrace.learner.checkpoints.record import CheckpointRecord, write_record
from headrace.learner.store.structs import Cursor, Settlement
from tests.support.guard import GUARD_S

LONG = 44


# The schedule


def test_a_seed_is_a_schedule() -> None:
    assert schedule(7, LONG) == schedule(7, LONG)
    assert schedule(7, LONG) != schedule(8, LONG)


def test_the_schedule_of_a_seed_does_not_change() -> None:
    """Others run the seeds that are told to them; the order is what a report names."""
    assert [fault.kind for fault in schedule(7, 4)] == [
        Kind.FREEZE_ENGINE,
        Kind.KILL_ENGINE,
        Kind.FREEZE_REPLICA,
        Kind.TRUNCATE_CHECKPOINT,
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_faults", [len(KINDS), LONG])
def test_every_kind_comes_and_as_often_as_the_others(seed: int, num_faults: int) -> None:
    faults = schedule(seed, num_faults)
    times = Counter(fault.kind for fault in faults)
    assert [fault.number for fault in faults] == list(range(1, num_faults + 1))
    assert set(times) == set(KINDS)
    assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_about_every_fourth_fault_overlaps_one_that_strikes_something_else(seed: int) -> None:
    faults = schedule(seed, LONG)
    pairs = [(before, fault) for before, fault in itertools.pairwise(faults) if fault.overlaps]
    assert 9 <= len(pairs) <= 11 and not faults[0].overlaps
    for before, fault in pairs:
        assert PARTS[before.kind] != PARTS[fault.kind]
        assert Kind.REPLACE_LEARNER not in (before.kind, fault.kind)


@pytest.mark.parametrize("seed", range(20))
def test_a_kind_that_is_listed_twice_comes_twice_as_often(seed: int) -> None:
    faults = schedule(seed, 20, [*KINDS, *EPISODE_KINDS * 2])
    assert Counter(fault.kind for fault in faults) == dict.fromkeys(KINDS, 1) | dict.fromkeys(EPISODE_KINDS, 2)
    assert all(
        PARTS[before.kind] != PARTS[fault.kind] for before, fault in itertools.pairwise(faults) if fault.overlaps
    )


def test_one_kind_alone_never_overlaps() -> None:
    faults = schedule(0, 9, [Kind.KILL_REDIS])
    assert [fault.kind for fault in faults] == [Kind.KILL_REDIS] * 9
    assert not any(fault.overlaps for fault in faults)


@pytest.mark.parametrize("seed", range(10))
def test_parameters_are_within_their_bounds(seed: int) -> None:
    for fault in schedule(seed, LONG):
        low, high = HOLD_S.get(fault.kind, (0.0, 0.0))
        assert low <= fault.hold_s <= high and 0 <= fault.pause_s <= 2
        assert fault.choose(3) in (0, 1, 2)


# The proxy


class Echo:
    """A server that answers with what it is sent."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.received: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while chunk := connection.recv(1 << 16):
                    self.received.append(chunk)
                    connection.sendall(chunk)
            except OSError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


def connected(proxy: Proxy, timeout_s: float = GUARD_S) -> closing[socket.socket]:
    return closing(socket.create_connection(("127.0.0.1", proxy.port), timeout_s))


def received(client: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (chunk := client.recv(1 << 16)):
        found += chunk
    return found


def test_a_good_proxy_is_not_noticed(proxy: Proxy) -> None:
    sent = random.Random(0).randbytes(1 << 20)
    with connected(proxy) as client:
        threading.Thread(target=client.sendall, args=(sent,), daemon=True).start()
        assert received(client, len(sent)) == sent
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b"", "the end of the sender is passed on, and comes back"


def test_a_cut_resets_connections_and_refuses_new_ones_until_it_is_over(proxy: Proxy) -> None:
    port = proxy.port
    with connected(proxy) as client:
        client.sendall(b"before")
        assert received(client, 6) == b"before"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connected(proxy)
    proxy.pass_on()
    assert proxy.port == port
    with connected(proxy) as client:
        client.sendall(b"after")
        assert received(client, 5) == b"after"


def test_a_delay_is_of_every_chunk_each_way(proxy: Proxy) -> None:
    with connected(proxy) as client:
        for delay_s in (0.15, 0.0):
            proxy.delay(delay_s)
            started = time.monotonic()
            client.sendall(b"x")
            assert received(client, 1) == b"x"
            assert time.monotonic() - started >= 2 * delay_s
            proxy.pass_on()


def test_a_stall_accepts_and_passes_nothing_until_it_is_over(proxy: Proxy, echo: Echo) -> None:
    proxy.stall()
    with connected(proxy, 0.3) as client:
        client.sendall(b"late")
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert not echo.received
        client.settimeout(GUARD_S)
        proxy.pass_on()
        assert received(client, 4) == b"late"


def test_what_was_held_back_arrives_though_its_sender_has_given_up(proxy: Proxy, echo: Echo) -> None:
    proxy.stall()
    with connected(proxy) as client:
        client.sendall(b"a command")
    proxy.pass_on()
    until(lambda: b"".join(echo.received) == b"a command")


def test_a_server_that_is_away_ends_the_connection(echo: Echo) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        port = nobody.getsockname()[1]
    with Proxy(port) as proxy, connected(proxy) as client, suppress(ConnectionResetError):
        assert client.recv(1) == b""


def test_no_thread_is_left(echo: Echo) -> None:
    with Proxy(echo.port) as proxy, connected(proxy) as client:
        client.sendall(b"x")
        received(client, 1)
    assert "proxy" not in {thread.name for thread in threading.enumerate()}


def until(condition: object) -> None:
    deadline = time.monotonic() + GUARD_S
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The accounts


def evidence(**changes: Any) -> Evidence:
    """Two steps of two tickets; one ticket is open, one answered; the second step is in the checkpoint alone."""
    rows = [
        {"kind": "evaluation", "step": 0},
        {"kind": "step", "step": 1, "weight_version": 2, "tickets": ["0-0", "0-2"]},
        {"kind": "step", "step": 2, "weight_version": 5, "tickets": ["0-3", "0-4"]},
    ]
    ledger = {"0-0": "trained", "0-1": "uniform", "0-2": "trained", "0-3": "answered 7-0", "0-4": "answered 8-0"}
    ledger |= {"0-5": "open 3-0", "0-6": "answered 9-0"}
    entries = {"0-3": "7-0", "0-4": "8-0", "0-5": "3-0", "0-6": "9-0"}
    recorded = {"0-3": "trained", "0-4": "trained"}
    return Evidence(rows, ledger, recorded, entries, (0, 7))._replace(**changes)


def texts(found: list[Violation]) -> str:
    return "; ".join(f"{violation.ticket} {violation.text}" for violation in found)


def test_sound_accounts_have_no_violation() -> None:
    assert check(evidence(), num_steps=2, groups_per_step=2) == []


def test_a_ticket_that_two_steps_trained_is_found() -> None:
    rows = [*evidence().rows[:2], {"kind": "step", "step": 2, "weight_version": 5, "tickets": ["0-0", "0-3"]}]
    found = texts(check(evidence(rows=rows), 2, 2))
    assert "0-0 trained twice" in found and "0-4 is trained, and no step has it" in found


def test_a_step_that_is_missing_or_taken_twice_is_found() -> None:
    rows = evidence().rows
    assert "expected the steps 1 to 3" in texts(check(evidence(), 3, 2))
    assert "expected the steps 1 to 2" in texts(check(evidence(rows=[*rows, rows[-1]]), 2, 2))


def test_versions_that_do_not_grow_and_short_batches_are_found() -> None:
    rows = [*evidence().rows[:2], {"kind": "step", "step": 2, "weight_version": 2, "tickets": ["0-3"]}]
    found = texts(check(evidence(rows=rows), 2, 2))
    assert "versions do not grow: [2, 2]" in found and "step 2 has 1 tickets" in found


def test_a_trained_ticket_that_is_nowhere_recorded_is_found() -> None:
    found = texts(check(evidence(recorded={"0-3": "trained"}), 2, 2))
    assert "0-4 trained by a step, and is answered" in found and "3 tickets are trained, expected 4" in found


def test_what_the_ledger_points_to_and_no_stream_has_is_lost() -> None:
    found = texts(check(evidence(entries={"0-3": "7-0", "0-4": "8-0", "0-5": "4-0", "0-6": "9-0"}), 2, 2))
    assert found == "0-5 lost: it is open 3-0, and the streams have 4-0"


def test_a_hole_below_the_cursor_is_lost() -> None:
    assert texts(check(evidence(cursor=(0, 9)), 2, 2)).count("lost: below the cursor") == 2


def test_a_group_that_the_learner_leaves_lying_is_found(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    prefix, now_ms = keys.tickets.removesuffix("tickets"), 1_700_000_000_000
    committed = {"0-0": 100, "0-1": 200, "0-2": 300_000}
    for name, after_ms in committed.items():
        client.xadd(keys.groups, {"id": name}, id=f"{now_ms + after_ms}-0")
    folder = tmp_path / "checkpoints" / "checkpoint-000001-000001"
    folder.mkdir(parents=True)
    trained = Settlement(keys.groups, f"{now_ms + 100}-0", "0-0", "trained")
    write_record(folder, CheckpointRecord(1, 10, 1, Cursor(0, 0), {}, [trained], [], [], {}, 0.0))
    ended_s = {step: now_ms / 1000 + 10.0 * step for step in range(1, 11)}
    found = stuck_groups(client, prefix, tmp_path, ended_s)
    assert [violation.ticket for violation in found] == ["0-1"], "0-0 is recorded, 0-2 is new"
    assert stuck_groups(client, prefix, tmp_path, {10 - STUCK_AFTER_STEPS + 1: 0.0}) == [], "nobody knows yet"


# The disk


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-000001-{number:06d}"
        folder.mkdir()
        (folder / "state.safetensors").write_bytes(bytes(1000))
        files = {"state.safetensors": file_entry(folder / "state.safetensors")}
        write_record(folder, CheckpointRecord(1, number, number, Cursor(0, 0), {}, [], [], [], {}, 0.0, files=files))
    return tmp_path


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("place", [0.0, 0.4, 0.9999])
def test_a_truncated_checkpoint_is_unreadable_and_the_one_before_is_not(
    checkpoints: Path, choice: int, place: float
) -> None:
    first, second = readable_checkpoints(checkpoints)
    told = truncate(second, choice, place)
    assert ("record.json", "state.safetensors")[choice] in told
    assert readable_checkpoints(checkpoints) == [first]
    assert is_readable(first) and not is_readable(second)


# The eyes


@pytest.fixture
def observer(redis_url: str, keys: Keys) -> Iterator[Observer]:
    seeing = Observer(redis_url, keys, num_replicas=2, group_checks=GroupChecks())
    yield seeing
    seeing.close()


def add_step(client: redis.Redis, keys: Keys, began_s: float, ended_s: float) -> None:
    event = {"step": 3, "time_s": ended_s, "step_s": ended_s - began_s, "reward": 1.0}
    client.xadd(keys.events, {"kind": "step", "event": json.dumps(event)})


def beat(client: redis.Redis, keys: Keys, name: str, state: str = "running", ttl_ms: int = 10_000) -> None:
    heartbeat = Heartbeat(name, "http://127.0.0.1:1", state, "", 1, 0, 0, 0, 0.0, 0.0)  # type: ignore[arg-type]
    client.set(keys.replica(name), encode(heartbeat), px=ttl_ms)


def answer(client: redis.Redis, keys: Keys, name: str, leased_s: float) -> None:
    group = {"replica": name, "timings": {"leased_s": leased_s, "sampled_s": leased_s + 1}, "rollouts": []}
    client.xadd(keys.groups, {"id": "0-0", "group": msgspec.msgpack.encode(group)})


def test_a_run_works_once_a_whole_step_and_every_replica_say_so(
    observer: Observer, client: redis.Redis, keys: Keys
) -> None:
    fault_s = time.time()

    def has_recovered() -> bool:
        observer.poll()
        return observer.has_recovered(fault_s, fault_s + 0.001)

    for name in ("a", "b"):
        beat(client, keys, name)
    add_step(client, keys, fault_s - 1, fault_s + 2)
    time.sleep(0.002)
    assert not has_recovered(), "the step began before the fault"
    add_step(client, keys, fault_s + 1, fault_s + 2)
    assert not has_recovered(), "no replica has answered"
    answer(client, keys, "a", fault_s + 1)
    answer(client, keys, "b", fault_s - 1)
    assert not has_recovered(), "b answered what it had leased before"
    answer(client, keys, "b", fault_s + 1)
    assert has_recovered()
    beat(client, keys, "b", "quarantined")
    time.sleep(0.02)
    assert not has_recovered()


def test_a_heartbeat_from_before_the_fault_counts_for_nothing(
    observer: Observer, client: redis.Redis, keys: Keys
) -> None:
    for name in ("a", "b"):
        beat(client, keys, name)
        answer(client, keys, name, time.time() + 1)
    observer.poll()
    time.sleep(0.01)
    fault_s = time.time()
    observer.poll()
    assert observer.serving_since(fault_s) == [], "these heartbeats have only aged"
    beat(client, keys, "a")
    observer.poll()
    assert observer.serving_since(fault_s) == ["a"]


def test_a_redis_that_is_away_is_nothing_new(keys: Keys) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        port = nobody.getsockname()[1]
    seeing = Observer(f"redis://127.0.0.1:{port}", keys, 1, GroupChecks())
    seeing.poll()
    assert seeing.learner() == {} and seeing.epoch() == 0 and not seeing.has_recovered(0.0, 0.0)
    seeing.close()


# The report


def injected_fault(number: int, kind: Kind, recovery_s: float | None) -> InjectedFault:
    fault = Fault(number, kind, 0.0, False, 0.0, 0.0, 0.0, 0.0)
    return InjectedFault(fault, "it", 100.0, ended_s=101.0, recovery_s=recovery_s)


def results(**changes: object) -> Results:
    injected = [
        injected_fault(1, Kind.KILL_REDIS, 3.0),
        injected_fault(2, Kind.KILL_REDIS, None),
        injected_fault(3, Kind.KILL_LEARNER, 9.0),
    ]
    found = Results(injected=injected, num_steps=24)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_summary_of_a_sound_run() -> None:
    summary = summarise(results(), 7, 0.9, 0.95, "")
    assert {key: summary[key] for key in ("faults", "lost", "trained_twice", "violations")} == {
        "faults": 3,
        "lost": 0,
        "trained_twice": 0,
        "violations": 0,
    }
    assert summary["recovery_s"] == {"p50": 6.0, "max": 9.0}
    assert summary["held_out_after"] == 0.9 and summary["held_out_after_undisturbed"] == 0.95
    assert summary["kinds"]["kill_redis"]["overlapped"] == 1
    assert problems(summary) == []
    json.dumps(summary)


def test_what_is_lost_or_trained_twice_is_counted_with_its_fault_and_is_a_failure() -> None:
    lost, twice = Violation("0-1", "lost: gone"), Violation("0-2", "trained twice: by 2 steps")
    summary = summarise(results(violations={lost: 3, twice: 0}), 7, 0.9, None, "")
    assert (summary["lost"], summary["trained_twice"], summary["violations"]) == (1, 1, 2)
    assert summary["kinds"]["kill_learner"]["lost"] == 1 and summary["kinds"]["kill_redis"]["lost"] == 0
    assert problems(summary) == ["1 lost", "1 trained twice", "2 violations"]


def test_dead_tickets_and_a_worse_policy_are_failures() -> None:
    assert problems(summarise(results(dead={"0-1": "never answered"}), 7, 0.9, None, "")) == [
        "1 dead tickets: never answered"
    ]
    assert problems(summarise(results(), 7, 0.86, 0.95, "")) == ["final accuracy 0.860, undisturbed 0.950"]
    assert problems(summarise(results(), 7, None, None, "")) == ["no final accuracy"]


def test_a_run_that_did_not_recover_is_a_failure_and_keeps_what_was_seen() -> None:
    summary = summarise(results(failure="no step within 240 s"), 7, None, None, "")
    assert summary["faults"] == 3
    assert problems(summary) == ["the schedule was not completed: no step within 240 s"]


def test_a_disk_that_could_not_be_filled_is_said() -> None:
    assert summarise(results(), 7, 0.9, 0.9, "must be superuser")["not_tried"] == {"fill_disk": "must be superuser"}


def test_a_strike_ends_once(redis_url: str) -> None:
    ends: list[float] = []
    held = injected_fault(1, Kind.FREEZE_REDIS, None)
    held.ended_s, held.is_over, held.end = None, lambda: len(ends) == 0, lambda: ends.append(time.time())
    held.end_if_due()
    held.end_if_due()
    held.finish()
    assert len(ends) == 1 and held.ended_s is not None


def test_nothing_is_found_of_a_launcher_that_was_not_started(tmp_path: Path) -> None:
    launched = Launched("faked", tmp_path, Path("recipe.yaml"), None, 1)
    assert launched.learner() is None and launched.replica(0) is None and launched.engine(0) == []
    assert launched.environment_workers(0) == []
    launched.close()
    assert not launched.is_running and launched.returncode is None
