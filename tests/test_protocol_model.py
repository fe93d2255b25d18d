"""The protocol against a plain model: any order of events, with a crash between any two Redis commands.

Everything here is real but the policy, the trainer and the answers: learners are put together by `assembly`, take
steps and checkpoints by `Loop`, read by `Intake` (its thread's turns are taken here); replicas are `TicketStore`s. A
learner dies, freezes and wakes up beside its successor, finds Redis full or empty or its newest checkpoint corrupt,
and sends a command twice. A replica that dies only leaves its leases, so every lease ever taken may still be acted on.

The model is what the weights of each learner have seen (`Line`), what each checkpoint therefore must hold, and the
marks of the ledger as they were. Checked after every event: a ticket once issued has one state and goes on only as
`AFTER` says; the streams hold what the marks point to, foreign entries apart; a committed group stays as it was
committed until it is consumed; a final mark agrees with every checkpoint that could still be loaded; no ticket is
trained twice on one line of weights, nor uniform or stale unless it is; a checkpoint names all that is unfinished;
`audit` finds nothing; who was overtaken changes nothing. And at the end everything that was issued gets its answer.
"""

import asyncio
import contextlib
import copy
import itertools
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import redis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common import weights
from common.config import RunConfig
from common.keys import TICKET_GROUP, Keys
from common.ledger import Mark, TicketName, parse_mark, parse_name
from common.redis_client import connect, connect_async
from common.waiting import Waits
from common.wire import Group, TicketState, Timings, encode
from services.generation import tickets
from services.generation.tickets import Lease, TicketStore
from services.learner import assembly, intake, scripts, versions
from services.learner.api import Switches
from services.learner.audit import audit
from services.learner.checkpoint import NUM_KEPT, TENSORS_FILE
from services.learner.checkpoint_record import RECORD_FILE, checkpoint_folders, read_record
from services.learner.dead import dead_entries, purge, retry
from services.learner.loop import Loop
from services.learner.staleness import group_staleness
from services.learner.store import Fenced, RedisLost
from tests.crashing_redis import Crash, Fault, Trap, faults
from tests.making import make_rollout
from tests.test_intake import Counting, PlainTokenizer

NUM_EXAMPLES = int(os.environ.get("HEADRACE_EXAMPLES", "40"))
NUM_PROMPTS, FUTURE = 7, 1_000_000
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "x"},
        "task": {"name": "arithmetic"},
        "actor": {"group_size": 2},
        "learner": {"groups_per_step": 2, "max_staleness": 1, "checkpoint_interval_steps": 10_000, "steps": 10_000},
        "evaluation": {"num_prompts": 2, "num_samples": 2},
    }
)
G, MAX_STALENESS = CONFIG.learner.groups_per_step, CONFIG.learner.max_staleness
FINAL: tuple[TicketState, ...] = ("trained", "uniform", "stale", "evaluated")
AFTER = {"open": {"open", "queued", "dead"}, "queued": {"queued", "dead", *FINAL}, "dead": {"dead", "open"}}
AFTER |= {state: {state} for state in FINAL}
STREAMS = ("tickets", "eval", "groups", "evaluated", "dead")
KINDS = ["mixed", "mixed", "mixed", "uniform", "old", "future", "fail", "hand back"]
JUNK = [{"id": "9-99", "group": "?"}, {"id": "x", "ticket": "?"}, {"unheard": "of"}]
LEARNER_SCRIPTS = (scripts.EXECUTE, scripts.ADD, scripts.SETTLE, scripts.BURY, scripts.REVIVE)
READS_BELOW = 2 * CONFIG.learner.max_outstanding_groups


@dataclass
class Line:
    """What one learner's weights have seen, from the run's first step on."""

    step: int = 0
    states: dict[str, TicketState] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        return [zlib.crc32(name.encode()) for name, state in self.states.items() if state == "trained"]


class Life(NamedTuple):
    """One learner's process."""

    loop: Loop
    line: Line


class Trainer:
    """Its weights are the tickets that it was trained on."""

    def __init__(self, config: RunConfig, policy: Any) -> None:
        self.policy = policy
        self.trained: list[int] = []

    def train(self, groups: Sequence[Group], step: int, version_steps: dict[int, int]) -> dict[str, float]:
        self.trained += [zlib.crc32(group.ticket.id.encode()) for group in groups]
        return {}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"trained": torch.tensor(self.trained, dtype=torch.int64)}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.trained = tensors["trained"].tolist()


class Policy:
    def __init__(self, *_: object) -> None:
        self.model = SimpleNamespace(
            get_input_embeddings=lambda: SimpleNamespace(num_embeddings=512),
            config=SimpleNamespace(),
            generation_config=SimpleNamespace(eos_token_id=1),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(1)}


class Tokenizer(PlainTokenizer):
    def __len__(self) -> int:
        return 512


class Stepwise(Loop):
    """Takes what is there, and never waits."""

    def _wait_for_batch(self) -> Any:
        return self.intake.take_batch(0.0, lambda: True)


class Nobody:
    """Told of new versions."""

    def __init__(self, **_: object) -> None: ...
    def submit(self, *_: object) -> None: ...


class Server:
    """The Redis of the test, and who connects to it."""

    def __init__(self, url: str) -> None:
        self.client = connect(url, deadline_s=0.0)
        self.runner = asyncio.Runner()
        self.asynchronous = connect_async(url, deadline_s=0.0)
        self.runs = itertools.count()
        for script in (*LEARNER_SCRIPTS, tickets.MOVE, tickets._RENEW):  # or the first run sends more commands
            self.client.script_load(script)

    def new_client(self) -> redis.Redis:
        return redis.Redis(connection_pool=self.client.connection_pool)

    def new_async_client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis(connection_pool=self.asynchronous.connection_pool)

    def limit(self, max_memory: str) -> None:
        self.client.config_set("maxmemory", max_memory)

    def close(self) -> None:
        self.runner.run(self.asynchronous.aclose())
        self.runner.close()
        self.client.close()


LEARNER_FAULTS = faults(8, "before", "after", "twice", "frozen", "full")
REPLICA_FAULTS = faults(2, "before", "after", "twice")


class Protocol(RuleBasedStateMachine):
    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__()
        self.server, self.folder = server, folder
        self.client = server.client
        self.keys = Keys(f"model-{next(server.runs)}")
        self.trap = Trap(self._overtake, lambda: server.limit("1mb"), lambda: server.limit("0"))
        asynchronous = self.trap.guard_async(server.new_async_client())
        self.replicas = [TicketStore(asynchronous, self.keys, name) for name in "abc"]
        self.leases: list[tuple[TicketStore, Lease]] = []
        self.life: Life | None = None
        self.sleeper: Life | None = None
        self.as_overtaken: object = None
        self.saved: dict[str, Line | None] = {}
        """What each checkpoint holds; None if it was corrupted."""
        self.marks: dict[str, Mark] = {}
        self.died: set[str] = set()
        self.groups: dict[str, tuple[str, Group]] = {}
        """Every group ever committed, and of what kind it is, by its entry."""
        self.planted: set[str] = set()
        self.is_lost = self.was_lost = False

    # What happens

    @initialize()
    def first_start(self) -> None:
        self._take_up()

    @precondition(lambda self: self.life is None)
    @rule(fault=faults(30, "before", "after", "twice", "full"))
    def start(self, fault: Fault | None) -> None:
        self._take_up(fault)

    @precondition(lambda self: self.life is not None)
    @rule(name=st.sampled_from(["turn", "step", "look", "evaluate", "checkpoint"]), fault=LEARNER_FAULTS)
    def learn(self, name: str, fault: Fault | None) -> None:
        self._act(name, fault)

    @precondition(lambda self: self.life is not None and not self.is_lost)
    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), is_saved=st.booleans())
    def calm_round(self, kinds: list[str], is_saved: bool) -> None:
        self._round(kinds)
        if is_saved:
            self._act("checkpoint")

    @precondition(lambda self: self.life is not None)
    @rule()
    def freeze(self) -> None:
        self._overtake()

    @precondition(lambda self: self.sleeper is not None and not self.is_lost)
    @rule(name=st.sampled_from(["turn", "step", "look", "evaluate", "checkpoint"]))
    def wake(self, name: str) -> None:
        assert self.sleeper is not None
        before = self._everything(), checkpoint_folders(self.checkpoints)
        try:
            self._deed(self.sleeper.loop, name)
            assert name not in ("step", "checkpoint"), "a learner that was overtaken goes on"
        except Fenced:
            pass
        after = self._everything(), checkpoint_folders(self.checkpoints)
        assert after == before, "a learner that was overtaken has changed something"

    @rule()
    def kill(self) -> None:
        self.life = None

    @precondition(lambda self: len(self._loadable()) == NUM_KEPT and not self.was_lost)
    @rule(name=st.sampled_from([RECORD_FILE, TENSORS_FILE]))
    def corrupt(self, name: str) -> None:
        folder = self._loadable()[-1]
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        self.saved[folder.name] = self.life = None

    @rule(replica=st.integers(0, 2), stream=st.sampled_from(STREAMS[:2]), count=st.integers(1, 4), fault=REPLICA_FAULTS)
    def lease(self, replica: int, stream: str, count: int, fault: Fault | None) -> None:
        self._lease(self.replicas[replica], stream, count, False, fault)

    @rule(replica=st.integers(0, 2), stream=st.sampled_from(STREAMS[:2]), count=st.integers(1, 4), fault=REPLICA_FAULTS)
    def claim(self, replica: int, stream: str, count: int, fault: Fault | None) -> None:
        self._lease(self.replicas[replica], stream, count, True, fault)

    @rule(replica=st.integers(0, 2), fault=REPLICA_FAULTS)
    def renew(self, replica: int, fault: Fault | None) -> None:
        store, before = self.replicas[replica], self._pending()
        self._as_replica(store.renew([lease for owner, lease in self.leases if owner is store]), fault)
        assert self.is_lost or self._pending() == before

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), kind=st.sampled_from(KINDS), fault=faults(2, "before", "after", "twice", "full"))
    def answer(self, which: int, kind: str, fault: Fault | None) -> None:
        """One of the leases that are still good; a late one if there are none."""
        some = [(store, lease) for store, lease in self.leases if self._is_open(lease)] or self.leases
        self._answer(*some[-1 - which % len(some)], kind, fault)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 30), kind=st.sampled_from(KINDS), fault=REPLICA_FAULTS)
    def answer_late(self, which: int, kind: str, fault: Fault | None) -> None:
        self._answer(*self.leases[-1 - which % len(self.leases)], kind, fault)

    @rule(what=st.sampled_from([retry, purge]), which=st.none() | st.integers(0, 3), fault=REPLICA_FAULTS)
    def tell_dead(self, what: Callable[..., object], which: int | None, fault: Fault | None) -> None:
        """All of them, or one."""
        dead = [one.ticket_id for one in dead_entries(self.client, self.keys) if one.is_ticket]
        names = [name for name in dead if parse_name(name).kind == "train"]
        if which is None or names:
            with self.trap.armed(fault), contextlib.suppress(Crash):
                client = self.trap.guard(self.server.new_client())
                what(client, self.keys, [] if which is None else [names[which % len(names)]])

    @precondition(lambda self: not self.is_lost)
    @rule(stream=st.sampled_from(STREAMS[:4]), origin=st.sampled_from(STREAMS), made_up=st.sampled_from(JUNK))
    def plant(self, stream: str, origin: str, made_up: dict[str, str]) -> None:
        """A copy of an entry of `origin`; something made up if it is empty."""
        entries = self.client.xrevrange(getattr(self.keys, origin), count=1)
        fields = entries[0][1] if entries else made_up
        self.planted.add(self.client.xadd(getattr(self.keys, stream), fields).decode())

    @precondition(lambda self: not self.was_lost)
    @rule()
    def lose_redis(self) -> None:
        self.client.delete(*vars(self.keys).values())
        self.is_lost = self.was_lost = True
        self.marks = {}
        self.planted = set()

    # What must hold

    @invariant()
    def check(self) -> None:
        if self.is_lost:
            return
        self._compare_marks()
        copied = self._check_streams()
        kept = self._loadable()[-1:] if self.was_lost else self._loadable()
        for name, mark in self.marks.items():
            if mark.state in FINAL:
                assert kept, f"{name} is {mark}, and no checkpoint says so"
                for folder in kept:
                    assert self._line(folder).states.get(name) == mark.state, f"{name} is {mark}, not so in {folder}"
        self._check_numbers()
        found = audit(self.client, self.keys, self.folder)
        wrong = [(name, text) for name, text in found.violations if not (name in copied and text.endswith("as well"))]
        assert not wrong

    def _compare_marks(self) -> None:
        """What the ledger says follows from what it said."""
        marks = self._ledger()
        for name, old in self.marks.items():
            new = marks.get(name)
            assert new is not None and new.state in AFTER[old.state], f"{name} was {old} and is {new}"
            if old.state == "queued":
                is_useless = self.groups[old.entry_id][0] == "future"
                assert new == old or new.state in FINAL or is_useless, f"{name} was {old} and is {new}"
        for name in marks.keys() - self.marks.keys():
            assert marks[name].state == "open" or self.was_lost, f"{name} begins as {marks[name]}"
        self.marks = marks
        self.died |= {name for name, mark in marks.items() if mark.state == "dead"}

    def _check_streams(self) -> set[str]:
        """The names of the copies that somebody planted."""
        copied: set[str] = set()
        for stream in STREAMS:
            entries = {entry.decode(): fields for entry, fields in self.client.xrange(getattr(self.keys, stream))}
            pointed = {mark.entry_id: name for name, mark in self.marks.items() if self._home(name, mark) == stream}
            assert pointed.keys() <= entries.keys(), f"lost from {stream}: {pointed.keys() - entries.keys()}"
            foreign = entries.keys() - pointed.keys()
            if stream == "dead":
                assert len(foreign) <= len(self.planted)
            else:
                assert foreign <= self.planted, f"nobody's entries in {stream}: {foreign - self.planted}"
                assert stream not in STREAMS[:2] or {entry for entry, _ in self._pending(stream)} <= entries.keys()
                copied |= {entries[entry].get(b"id", b"?").decode() for entry in foreign}
            for entry, name in pointed.items():
                assert entries[entry][b"id"].decode() == name
                if stream in ("groups", "evaluated"):
                    assert entries[entry][b"group"] == encode(self.groups[entry][1])
        return copied

    def _check_numbers(self) -> None:
        """Every number below the cursor, and one replacement of every stale ticket, is somewhere."""
        epoch, place = (int(part or 0) for part in self.client.hmget(self.keys.cursor, "epoch", "place"))
        folder = (self._loadable() or [None])[-1]
        line = self.life.line if self.life else self._line(folder) if folder else Line()
        waiting = (
            self.life.loop.intake.source.to_issue() if self.life else read_record(folder).unfinished if folder else []
        )
        names = [parse_name(name) for name, state in line.states.items() if state == "stale"]
        names = [name._replace(reissue=1) for name in names if not name.reissue]
        names += [TicketName("train", *divmod(n, NUM_PROMPTS)) for n in range(epoch * NUM_PROMPTS + place)]
        known = self.marks.keys() | set(waiting) | (self.died | line.states.keys() if self.was_lost else set())
        assert not {str(name) for name in names} - known

    def _note(self, life: Life, num_noted: int) -> None:
        """What the learner has done since it had consumed `num_noted` groups."""
        loop, line = life
        for one in loop.intake.books.since_checkpoint[num_noted:]:
            kind, group = self.groups[one.entry_id]
            is_stale = group_staleness(group, line.step, loop.intake.version_steps).total > MAX_STALENESS
            expected = "uniform" if kind == "uniform" else "stale" if is_stale else "trained"
            expected = "evaluated" if group.ticket.kind == "eval" else expected
            assert one.state == expected and kind != "future", f"{one}: expected {expected} for {kind}"
            assert one.ticket_id not in line.states, f"{one} once more"
            line.states[one.ticket_id] = one.state
        line.step = loop.progress.step
        assert loop.trainer.trained == line.trained or self.life is not life

    def _note_checkpoint(self, life: Life) -> None:
        for folder in checkpoint_folders(self.checkpoints):
            if folder.name not in self.saved:
                line, record = copy.deepcopy(life.line), read_record(folder)
                self.saved[folder.name] = line
                assert record.step == line.step
                assert {s: record.counts.get(s, 0) for s in FINAL} == {
                    s: list(line.states.values()).count(s) for s in FINAL
                }
                names = [name for name, mark in self._ledger().items() if mark.state in ("open", "queued")]
                waiting = {name for name in names if name not in line.states and parse_name(name).kind == "train"}
                assert waiting <= set(record.unfinished)
                assert all(parse_name(name).kind == "train" for name in record.unfinished)

    # How it is done

    def _take_up(self, fault: Fault | None = None) -> None:
        folders = self._loadable()
        line = copy.deepcopy(self._line(folders[-1])) if folders else Line()
        client = self.trap.guard(self.server.new_client())
        arguments = (CONFIG, self.folder, "", client, self.keys, "http://x", Counting(NUM_PROMPTS), Switches(), Waits())
        try:
            with self.trap.armed(fault):
                loop, _ = assembly.assemble(*arguments)
                loop._publish()
                loop.intake.take_up()
        except (Crash, redis.OutOfMemoryError):
            return
        assert loop.progress.step == line.step
        self.life, self.is_lost = Life(loop, line), False
        self._note(self.life, 0)

    def _act(self, name: str, fault: Fault | None = None) -> None:
        """The learner does one thing, and lives on if it can."""
        life = self.life
        assert life is not None
        intake, num_noted, was_lost = life.loop.intake, len(life.loop.intake.books.since_checkpoint), self.is_lost
        try:
            with self.trap.armed(fault):
                self._deed(life.loop, name)
        except (Crash, redis.OutOfMemoryError):
            self.life = None
        except RedisLost:
            assert was_lost
            self.life = None
        except (Fenced, FileNotFoundError):  # the files of its versions are gone
            assert self.trap.sprung == "frozen"
        if self.trap.sprung == "frozen":
            assert self._everything() == self.as_overtaken, "a learner that was overtaken has changed something"
        self._note(life, num_noted)
        self._note_checkpoint(life)
        if name == "turn" and self.life is life and not self.is_lost and len(intake._arrived) < READS_BELOW:
            seen = {
                one.entry_id
                for one in (*intake.books.since_checkpoint, *intake.books.recorded, *(a.entry for a in intake._arrived))
            }
            queued = {mark.entry_id for mark in self._ledger().values() if mark.state == "queued"}
            assert queued <= seen, f"groups that the learner never sees: {queued - seen}"

    def _deed(self, loop: Loop, name: str) -> None:
        if name == "turn":
            loop.intake.turn()
        elif name == "look":
            loop.intake.look_around()
        elif name == "step":
            loop._take_step()
        elif name == "checkpoint":
            loop._checkpoint()
        elif not loop.intake.is_evaluating and f"eval-{loop.versions.current}-0" not in self.marks:
            loop.intake.begin_evaluation(loop.progress.step, loop.versions.current)

    def _overtake(self) -> None:
        """The learner sleeps, and another one starts."""
        assert self.life is not None
        self._note_checkpoint(self.life)
        self.sleeper = self.life
        self._take_up()
        self.as_overtaken = self._everything()

    def _as_replica(self, act: Coroutine[Any, Any, Any], fault: Fault | None) -> Any:
        """None if it crashed."""
        try:
            with self.trap.armed(fault):
                return self.server.runner.run(act)
        except (Crash, redis.OutOfMemoryError):
            return None

    def _lease(self, store: TicketStore, stream: str, count: int, is_claim: bool, fault: Fault | None = None) -> None:
        key = getattr(self.keys, stream)
        act = store.claim(key, count, 0.0) if is_claim else store.lease(key, count, 0.001)
        self.leases += [(store, lease) for lease in self._as_replica(act, fault) or []]

    def _answer(self, store: TicketStore, lease: Lease, kind: str, fault: Fault | None = None) -> None:
        """Exactly what the lease still allows happens, or nothing if the replica has crashed before."""
        ticket, was, is_open = lease.ticket, self.marks.get(lease.ticket.id), self._is_open(lease)
        if ticket.kind == "eval" and kind in ("fail", "future") and not ticket.id.endswith("-0"):
            kind = "mixed"  # an evaluation of which all is dead stops the learner
        group = None
        if kind == "fail":
            act: Coroutine[Any, Any, Any] = store.fail(lease, "told to", CONFIG.generation.max_attempts)
        elif kind == "hand back":
            act = store.hand_back(lease)
        else:
            version = {"old": 1, "future": FUTURE}.get(kind, self.life.loop.versions.current if self.life else 1)
            rewards = (1.0, 1.0) if kind == "uniform" else (1.0, 0.0)
            group = Group(ticket, [make_rollout(r, version=version) for r in rewards], "r", Timings(0, 0, 0))
            act = store.commit(lease, group)
        moved = self._as_replica(act, fault)
        mark = self._ledger().get(ticket.id)
        if self.trap.sprung not in ("before", "full"):
            assert (mark != was) == is_open
        if group is not None and mark != was and mark is not None:
            self.groups[mark.entry_id] = (kind, group)
        if group is not None and self.trap.sprung is None:
            assert moved == is_open
        if not self.is_lost:
            self._compare_marks()

    def _round(self, kinds: Sequence[str] = ("mixed",)) -> None:
        """Whatever is open is answered, by claims too, and a step is taken."""
        self._act("turn")
        self._compare_marks()
        num_leases = len(self.leases)
        for stream, is_claim in itertools.product(STREAMS[:2], (False, True)):
            self._lease(self.replicas[0], stream, 100, is_claim)
        self._compare_marks()
        for (store, lease), kind in zip(self.leases[num_leases:], itertools.cycle(kinds), strict=False):
            self._answer(store, lease, kind)
        self._act("turn")
        self._act("step")

    def _drain(self) -> None:
        if self.life is None or self.is_lost:
            self._take_up()
        assert self.life is not None
        loop, line = self.life
        self._act("look")
        loop.intake.is_admitting = False
        for _ in range(20):
            self._round()
            if not self._open() and len(loop.intake._arrived) < G:
                break
        for _ in range(2):
            self._act("checkpoint")
        self.check()
        queued = {mark.entry_id for mark in self.marks.values() if mark.state == "queued"}
        assert len(queued) < G and queued == {arrived.entry.entry_id for arrived in loop.intake._arrived}
        assert not self._open()
        states = {name: mark.state for name, mark in self.marks.items() if mark.state in FINAL}
        assert states.items() <= line.states.items() and (self.was_lost or states == line.states)
        entries = {
            entry.decode() for stream in STREAMS[:4] for entry, _ in self.client.xrange(getattr(self.keys, stream))
        }
        assert entries == queued and not self._pending()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._drain()
        finally:
            self.client.delete(*vars(self.keys).values())
            shutil.rmtree(self.folder)

    # What there is

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _loadable(self) -> list[Path]:
        return [folder for folder in checkpoint_folders(self.checkpoints) if self.saved.get(folder.name)]

    def _line(self, folder: Path) -> Line:
        line = self.saved[folder.name]
        assert line is not None
        return line

    def _ledger(self) -> dict[str, Mark]:
        return {name.decode(): parse_mark(mark) for name, mark in self.client.hgetall(self.keys.ledger).items()}

    def _open(self) -> list[str]:
        return [name for name, mark in self.marks.items() if mark.state == "open"]

    def _is_open(self, lease: Lease) -> bool:
        return self.marks.get(lease.ticket.id) == Mark("open", lease.entry_id)

    def _home(self, name: str, mark: Mark) -> str:
        homes = {"open": STREAMS[:2], "queued": STREAMS[2:4], "dead": ("dead", "dead")}.get(mark.state)
        return homes[parse_name(name).kind == "eval"] if homes and mark.entry_id else ""

    def _pending(self, *streams: str) -> set[tuple[str, str]]:
        """Entries that were delivered, and to whom."""
        found = set()
        for stream in streams or STREAMS[:2]:
            group = TICKET_GROUP
            with contextlib.suppress(redis.ResponseError):  # Redis is lost
                rows = self.client.xpending_range(getattr(self.keys, stream), group, "-", "+", 1000)
                found |= {(row["message_id"].decode(), row["consumer"].decode()) for row in rows}
        return found

    def _everything(self) -> object:
        hashes = (self.keys.ledger, self.keys.cursor, self.keys.learner, self.keys.weights, self.keys.versions)
        streams = [getattr(self.keys, name) for name in (*STREAMS, "events")]
        return (
            [self.client.hgetall(key) for key in hashes],
            [self.client.xrange(key) for key in streams],
            self._pending(),
            self.client.get(self.keys.epoch),
            self.client.smembers(self.keys.retries),
        )


@pytest.fixture
def server(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Real but for what takes long: processes are killed here, not machines, so that nothing need reach the disk."""
    for module, name, other in (
        (assembly, "Policy", Policy),
        (assembly, "Trainer", Trainer),
        (assembly, "load_tokenizer", lambda path: Tokenizer()),
        (assembly, "Loop", Stepwise),
        (versions, "ThreadPoolExecutor", Nobody),
        (versions, "httpx", SimpleNamespace(Client=Nobody)),
        (versions, "fsync_path", lambda path: None),
        (weights, "fsync_path", lambda path: None),
        (intake, "READ_BLOCK_S", 0.001),
        (intake, "LOOK_INTERVAL_S", float("inf")),
    ):
        monkeypatch.setattr(module, name, other)
    server = Server(redis_url)
    server.client.config_set("appendfsync", "no", "hz", "500")
    yield server
    server.client.config_set("appendfsync", "always", "hz", "10")
    server.close()


@pytest.mark.timeout(0 if "HEADRACE_EXAMPLES" in os.environ else 300)
def test_the_protocol_holds_whatever_happens(server: Server, tmp_path: Path) -> None:
    run_state_machine_as_test(
        lambda: Protocol(server, tmp_path / "run"),
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
