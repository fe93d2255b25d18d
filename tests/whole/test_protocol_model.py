"""The protocol against a plain model: any order of events, with a crash between any two Redis commands.

All is real but the policy, the trainer and the answers. Learners are put together by `assembly`, take steps and
checkpoints by `Loop`, and read by `Intake`, whose thread's turns are taken here; replicas are `TicketStore`s, and play
episodes a step at a time (stepwise_episodes.py). A learner dies, sleeps while its successor starts and then goes on,
sends a command twice, finds Redis full, or empty, or its newest checkpoint corrupt. A replica that dies leaves nothing
but its leases, so every lease may still be acted on.

The model is what each learner's weights have seen (`Line`), hence what each checkpoint must hold, and how the ledger
may go on (`AFTER`). Guaranteed after every event: a ticket once issued has one state; the streams hold what the marks
point to, foreign entries apart, and every group as it was committed; a final mark agrees with every checkpoint that
could still be loaded; nothing is trained twice on one line of weights, nor uniform or stale unless it is; the learner
sees every group; a checkpoint names whatever is unfinished; who was overtaken changes nothing; `audit` finds nothing
wrong. And at the end whatever was issued gets its answer, and nothing else is left. Two disasters at once are not
modelled: after a loss of Redis, checkpoints are corrupted when there are two newer ones.
"""

import asyncio
import contextlib
import copy
import itertools
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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

from headrace.common.config import RunConfig
from headrace.common.process import atomic_files
from headrace.common.process.atomic_files import FileEntry
from headrace.common.process.waiting import Waits
from headrace.common.redis.client import connect, connect_async
from headrace.common.redis.keys import TICKET_GROUP, Keys
from headrace.common.tasks import BadRow, Prompt
from headrace.common.weights.files import MANIFEST_FILE, decode_manifest, version_folder
from headrace.common.wire import Group, TicketState, Timings, decode_ticket, encode
from headrace.common.wire.ledger import LedgerEntry, TicketId, parse_ledger_entry, parse_ticket_id
from headrace.generation.tickets.scripts import MOVE, RENEW
from headrace.generation.tickets.store import Lease, TicketStore
from headrace.learner import assembly
from headrace.learner.algorithm.staleness import group_staleness
from headrace.learner.checkpoints.checkpoint import NUM_KEPT
from headrace.learner.checkpoints.record import RECORD_FILE, checkpoint_folders, read_record
from headrace.learner.commands.audit import audit
from headrace.learner.commands.dead_letters import dead_letters, purge, retry
from headrace.learner.context import LearnerContext
from headrace.learner.distributed import state_files
from headrace.learner.distributed.state_files import STATE_FILE, read_state, write_state
from headrace.learner.intake import intake
from headrace.learner.intake.samples import TrainedRollout
from headrace.learner.loop import Loop
from headrace.learner.stages import background
from headrace.learner.steering.switches import Switches
from headrace.learner.store import scripts
from headrace.learner.store.fenced_redis import Fenced, RedisLost
from headrace.learner.training import leader
from headrace.learner.weights import publisher
from tests.learner.test_intake import Counting, PlainTokenizer
from tests.support.crashing_redis import Crash, Fault, Trap, faults
from tests.support.factories import make_rollout
from tests.support.stepwise_episodes import StepwiseLease

NUM_EXAMPLES = int(os.environ.get("HEADRACE_EXAMPLES", "40"))
NUM_PROMPTS, FUTURE = 7, 1_000_000
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "x"},
        "task": {"name": "arithmetic"},
        "actor": {"group_size": 2, "num_mini_batches": 1},
        "learner": {"groups_per_step": 2, "max_staleness": 1, "checkpoint_interval_steps": 10_000, "steps": 10_000},
        "evaluation": {"num_prompts": 2, "completions_per_prompt": 2},
    }
)
G = CONFIG.learner.groups_per_step
FINAL: tuple[TicketState, ...] = ("trained", "uniform", "stale", "evaluated")
AFTER: dict[str, set[str]] = {
    "open": {"open", "answered", "dead"},
    "answered": {"answered", "dead", *FINAL},
    "dead": {"dead", "open"},
}
AFTER |= {state: {state} for state in (*FINAL, "skipped")}
PASSED: dict[int, TicketState] = {2: "dead", 4: "skipped"}
"""Places of every epoch of which there is no ticket."""
WORK, ANSWERS = ("tickets", "eval_tickets"), ("groups", "eval_groups")
STREAMS = (*WORK, *ANSWERS, "dead_letters")
HOMES = {"open": WORK, "answered": ANSWERS, "dead": ("dead_letters", "dead_letters")}
KINDS = ["mixed", "mixed", "mixed", "uniform", "old", "future", "fail", "hand back"]
"""What a replica does with a ticket; a group of a future version is refused by the learner."""
EPISODE_STEPS: st.SearchStrategy[Any] = st.tuples(
    st.integers(0, 1), st.sampled_from(["turn", "turn", "finish", "finish", "fail", "interrupt"])
) | st.sampled_from(["the worker ends", "the replica drains", "the replica dies"])
JUNK = [{"id": "9-99", "group": "?"}, {"id": "x", "ticket": "?"}, {"unheard": "of"}]
NUM_COMMANDS = {"turn": 4, "step": 9, "publish": 4, "look": 4, "evaluate": 1, "checkpoint": 1, "write": 3}
"""About how many a learner sends."""
START_FAULT = faults(30, "before", "after", "twice", "full", "frozen")
LEARNER_FAULT = faults(12, "before", "after", "twice", "full", "frozen")
REPLICA_FAULT = faults(2, "before", "after", "twice", "full")
SCRIPTS = (*scripts.FENCED_SCRIPTS, MOVE, RENEW)


class Uneven(Counting):
    """One row is none, and one is too long."""

    def prompts(self, split: str, *, seed: int, epoch: int) -> Iterator[Prompt | BadRow]:  # type: ignore[override]
        for place, prompt in enumerate(super().prompts(split, seed=seed, epoch=epoch)):
            if split == "train" and place in PASSED:
                is_bad = PASSED[place] == "dead"
                yield BadRow("bad") if is_bad else Prompt([{"role": "user", "content": "x" * 4000}], prompt.reference)
            else:
                yield prompt


class Trainer:
    """Its weights are the tickets that it was trained on."""

    def __init__(self, _: RunConfig, policy: Any) -> None:
        self.policy = policy
        self.seen: list[int] = []

    def train(self, groups: Sequence[Group], *_: object) -> dict[str, float]:
        self.seen += [zlib.crc32(group.ticket.id.encode()) for group in groups]
        return {}

    def trained_rollouts(self, _: Group) -> list[TrainedRollout | None]:
        return []

    def copy_state(self) -> None:
        self.copied = torch.tensor(self.seen, dtype=torch.int64)

    def write_copy(self, folder: Path) -> dict[str, FileEntry]:
        return write_state(folder, {"seen": self.copied})

    def load_state(self, folder: Path, files: list[str]) -> None:
        self.seen = read_state(folder, files)["seen"].tolist()


class Policy:
    def __init__(self, *_: object) -> None:
        embeddings = SimpleNamespace(num_embeddings=512)
        ends = SimpleNamespace(eos_token_id=1)
        self.model: Any = SimpleNamespace(
            get_input_embeddings=lambda: embeddings, generation_config=ends, config=SimpleNamespace()
        )

    def published_weights(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(1)}

    def save_config_and_tokenizer(self, folder: Path, _: Any) -> None:
        folder.mkdir()

    def save_unchanged(self, file: Path) -> None:
        file.touch()


class Tokenizer(PlainTokenizer):
    def __len__(self) -> int:
        return 512

    def decode(self, tokens: list[int], **_: object) -> str:
        return "x" * len(tokens)


class Stepwise(Loop):
    """Takes what is there, and never waits."""

    def _wait_for_batch(self) -> Any:
        return self.intake.take_batch(0.0, lambda: True)


class Later:
    """In place of a thread: what it is given is done when somebody waits for it."""

    def __init__(self, **_: object) -> None: ...
    def submit(self, *given: Any) -> "Task":
        return Task(*given)


class Task:
    def __init__(self, act: Callable[..., object], *given: object) -> None:
        self._act: Callable[[], object] | None = partial(act, *given)
        self._failure: BaseException | None = None

    def done(self) -> bool:
        return self._act is None

    def result(self, _: float | None = None) -> None:
        act, self._act = self._act, None
        try:
            if act is not None:
                act()
        except BaseException as error:  # noqa: BLE001 - as a future keeps it
            self._failure = error
        if self._failure is not None:
            raise self._failure


class Nobody:
    """Is told of new versions."""

    def __init__(self, **_: object) -> None: ...
    def submit(self, *_: object) -> None: ...


@dataclass
class Line:
    """What one learner's weights have seen, from the run's first step on."""

    step: int = 0
    states: dict[str, TicketState] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        return [zlib.crc32(name.encode()) for name, state in self.states.items() if state == "trained"]


class Life(NamedTuple):
    """Of one learner's process."""

    loop: Any
    line: Line


class Server:
    """The Redis of the test, and who connects to it."""

    def __init__(self, url: str) -> None:
        self.client, self.asynchronous = connect(url, deadline_s=0.0), connect_async(url, deadline_s=0.0)
        self.runner = asyncio.Runner()
        self.num_runs = 0
        for script in SCRIPTS:  # or the first run would send more commands than the others
            self.client.script_load(script)

    def new_client(self) -> redis.Redis:
        return redis.Redis(connection_pool=self.client.connection_pool)

    def new_async_client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis(connection_pool=self.asynchronous.connection_pool)

    def limit(self, max_memory: str) -> None:
        self.client.config_set("maxmemory", max_memory)


@pytest.fixture
def server(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Real but for what takes long: processes die here, not machines, so that nothing need reach the disk."""
    for module, name, other in (
        (leader, "Policy", Policy),
        (leader, "Trainer", Trainer),
        (assembly, "load_tokenizer", lambda path: Tokenizer()),
        (assembly, "Loop", Stepwise),
        (publisher, "ThreadPoolExecutor", Nobody),
        (background, "ThreadPoolExecutor", Later),
        (publisher, "httpx", SimpleNamespace(Client=Nobody)),
        (publisher, "fsync_path", lambda path: None),
        (atomic_files, "fsync_path", lambda path: None),
        (state_files, "fsync_path", lambda path: None),
        (intake, "READ_BLOCK_S", 0.001),
        (intake, "CONTROL_POLL_INTERVAL_S", float("inf")),
    ):
        monkeypatch.setattr(module, name, other)
    server = Server(redis_url)
    server.client.config_set("appendfsync", "no", "hz", "500")
    yield server
    server.client.config_set("appendfsync", "always", "hz", "10")
    server.runner.run(server.asynchronous.aclose())
    server.runner.close()
    server.client.close()


def is_training(name: str) -> bool:
    return parse_ticket_id(name).kind == "train"


def birth_of(name: str) -> TicketState:
    return PASSED.get(parse_ticket_id(name).position, "open") if is_training(name) else "open"


class Protocol(RuleBasedStateMachine):
    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__()
        server.num_runs += 1
        self.server, self.client, self.folder = server, server.client, folder
        self.keys = Keys(f"model-{server.num_runs}")
        self.trap = Trap(self._overtake, lambda: server.limit("1mb"), lambda: server.limit("0"))
        asynchronous = self.trap.guard_async(server.new_async_client())
        self.replicas = [TicketStore(asynchronous, self.keys, name) for name in "abc"]
        self.leases: list[tuple[TicketStore, Lease]] = []
        self.played: list[StepwiseLease] = []
        self.life: Life | None = None
        self.sleeper: Life | None = None
        self.as_overtaken: object = None
        self.saved: dict[str, Line | None] = {}
        """What each checkpoint holds; None if it was corrupted."""
        self.marks: dict[str, LedgerEntry] = {}
        self.died: set[str] = set()
        self.skipped: set[str] = set()
        self.groups: dict[tuple[str, str], tuple[str, Group]] = {}
        """Every group ever committed, with its kind, by ticket and entry: two streams may have an entry of one id."""
        self.planted: set[str] = set()
        self.num_noted = 0
        """Of the consumed groups that no checkpoint has recorded yet, of the learner that acts, when its act began."""
        self.begun: dict[int, tuple[Line, set[str]]] = {}
        """Of each learner's latest checkpoint: what its weights had seen then, and what was unfinished."""
        self.announced = 0
        """The highest version."""
        self.is_lost = self.was_lost = False
        """Redis; `is_lost` until a learner has taken up the run again."""
        self.loses_redis = False
        """When the learner that is starting sleeps."""
        self.safe_until = 0
        """So many checkpoints must there have been before Redis is lost, and before one is corrupted after that."""

    @initialize(safe_until=st.integers(0, 6))
    def first_start(self, safe_until: int) -> None:
        self.safe_until = safe_until
        self._start_learner()

    @precondition(lambda self: self.life is None)
    @rule(fault=START_FAULT, loses_redis=st.booleans())
    def start(self, fault: Fault | None, loses_redis: bool) -> None:
        """`loses_redis`: while a learner that is starting sleeps."""
        self.loses_redis = loses_redis
        self._start_learner(fault)

    @precondition(lambda self: self.life is not None)
    @rule(name=st.sampled_from(list(NUM_COMMANDS)), fault=LEARNER_FAULT)
    def learn(self, name: str, fault: Fault | None) -> None:
        self._act(name, fault)

    @precondition(lambda self: self.life is not None and not self.is_lost)
    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), is_saved=st.booleans(), fault=LEARNER_FAULT)
    def calm_round(self, kinds: list[str], is_saved: bool, fault: Fault | None) -> None:
        """Calm until the checkpoint."""
        self._round(kinds)
        if is_saved:
            self._act("checkpoint")
            self._act("write", fault)

    @rule(how=st.sampled_from(["kill", "freeze", "lose Redis", RECORD_FILE, STATE_FILE]))
    def interrupt(self, how: str) -> None:
        """The learner sleeps while another one starts, or dies; or Redis loses everything, or a checkpoint a bit."""
        if how == "lose Redis":
            if not self.was_lost and len(self.saved) >= self.safe_until:
                self.client.delete(*vars(self.keys).values())
                self.is_lost = self.was_lost = True
                self.marks, self.planted, self.safe_until = {}, set(), len(self.saved)
        elif how == "freeze" and self.life is not None:
            self._overtake()
        else:
            self.life = None
            is_safe = self.was_lost and len(self.saved) < self.safe_until + NUM_KEPT
            if how not in ("kill", "freeze") and len(self._loadable()) == NUM_KEPT and not is_safe:
                newest = self._loadable()[-1]
                content = bytearray((newest / how).read_bytes())
                content[len(content) // 2] ^= 1
                (newest / how).write_bytes(content)
                self.saved[newest.name] = None

    @precondition(lambda self: self.sleeper is not None and not self.is_lost)
    @rule(name=st.sampled_from(list(NUM_COMMANDS)))
    def wake(self, name: str) -> None:
        assert self.sleeper is not None
        log = self.sleeper.loop.intake.settlement_log
        before = self._everything(), checkpoint_folders(self.checkpoints), [*log.since_checkpoint]
        try:
            is_writing = name == "write" and self.sleeper.loop.checkpointer.is_busy
            self._do(self.sleeper, name)
            assert name != "step" and not is_writing, "a learner that was overtaken goes on"
        except Fenced:
            pass
        after = self._everything(), checkpoint_folders(self.checkpoints), [*log.since_checkpoint]
        assert after == before, "a learner that was overtaken has changed or consumed something"

    @rule(
        how=st.sampled_from(["lease", "claim", "renew"]),
        store=st.integers(0, 2),
        stream=st.sampled_from(WORK),
        count=st.integers(1, 4),
        fault=REPLICA_FAULT,
    )
    def lease(self, how: str, store: int, stream: str, count: int, fault: Fault | None) -> None:
        """`renew`: by every replica, of all that it has ever leased."""
        if how != "renew":
            self._lease(self.replicas[store], stream, count, how == "claim", fault)
            return
        before = self._pending()
        for replica in self.replicas:
            self._as_replica(replica.renew([lease for owner, lease in self.leases if owner is replica]), fault)
        assert self.is_lost or self._pending() == before, "who renews takes nothing"

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 30), is_late=st.booleans(), kind=st.sampled_from(KINDS), fault=REPLICA_FAULT)
    def answer(self, which: int, is_late: bool, kind: str, fault: Fault | None) -> None:
        """One of the leases that are still good, if there is any; or whichever."""
        good = [(store, lease) for store, lease in self.leases if self._is_open(lease)]
        some = good if good and not is_late else self.leases
        self._answer(*some[-1 - which % len(some)], kind, fault)

    @precondition(lambda self: self.leases)
    @rule(
        which=st.integers(0, 30),
        is_new=st.booleans(),
        steps=st.lists(EPISODE_STEPS, min_size=1, max_size=6),
        fault=REPLICA_FAULT,
    )
    def play(self, which: int, is_new: bool, steps: list[Any], fault: Fault | None) -> None:
        """A replica plays the episodes of a lease, and goes on with them in later calls, whatever happens between."""
        good = [(store, lease) for store, lease in self.leases if self._is_open(lease) and is_training(lease.ticket.id)]
        if good and (is_new or not self.played):
            played = StepwiseLease(CONFIG, *good[-1 - which % len(good)], self._version)
            self.played.append(played)
            self._advance(played, played.begin(), fault)
        for step in steps:
            if self.played:
                self._step_episode(self.played[which % len(self.played)], step, fault)

    @rule(what=st.sampled_from([retry, purge]), which=st.none() | st.integers(0, 3), fault=REPLICA_FAULT)
    def tell_dead(self, what: Callable[..., object], which: int | None, fault: Fault | None) -> None:
        """All of them, or one."""
        names = [one.ticket_id for one in dead_letters(self.client, self.keys) if one.is_ticket]
        names = [name for name in names if is_training(name)]
        if which is None or names:
            with self.trap.armed(fault), contextlib.suppress(Crash, redis.OutOfMemoryError):
                client = self.trap.guard(self.server.new_client())
                what(client, self.keys, [] if which is None else [names[which % len(names)]])

    @precondition(lambda self: not self.is_lost)
    @rule(stream=st.sampled_from([*WORK, *ANSWERS]), origin=st.sampled_from(STREAMS), junk=st.sampled_from(JUNK))
    def plant(self, stream: str, origin: str, junk: dict[str, str]) -> None:
        """A copy of an entry of `origin`, or junk if it is empty."""
        entries = self.client.xrevrange(self._key(origin), count=1)
        self.planted.add(self.client.xadd(self._key(stream), entries[0][1] if entries else junk).decode())

    @invariant()
    def check(self) -> None:
        if self.is_lost:
            return
        ledger, (epoch, place), pending, *streams = self._read()
        self._compare({name.decode(): parse_ledger_entry(mark) for name, mark in ledger.items()})
        copied = self._check_streams({entry.decode() for entry in pending}, dict(zip(STREAMS, streams, strict=True)))
        for name, mark in self.marks.items():
            if mark.state in FINAL:
                kept = self._loadable()[-1:] if self.was_lost else self._loadable()
                assert kept, f"{name} is {mark}, and no checkpoint says so"
                for folder in kept:
                    assert self._line(folder).states.get(name) == mark.state, f"{name} is {mark}, not so in {folder}"
        self._check_versions(streams[STREAMS.index("tickets")] + streams[STREAMS.index("eval_tickets")])
        self._check_numbers(int(epoch or 0) * NUM_PROMPTS + int(place or 0))
        found = audit(self.client, self.keys, self.folder)
        assert not [one for one in found.violations if not (one[0] in copied and one[1].endswith("as well"))]

    def _compare(self, marks: dict[str, LedgerEntry]) -> None:
        """What the ledger says follows from what it said."""
        for name, old in self.marks.items():
            new = marks.get(name)
            assert new is not None and new.state in AFTER[old.state], f"{name} was {old} and is {new}"
            if old.state == "answered" and new != old:
                assert new.state in FINAL or self.groups[name, old.entry_id][0] == "future", (
                    f"{name} was {old} and is {new}"
                )
        for name in marks.keys() - self.marks.keys():
            assert marks[name].state == birth_of(name) or self.was_lost, f"{name} begins as {marks[name]}"
        self.marks = marks
        self.died |= {name for name, mark in marks.items() if mark.state == "dead"}
        self.skipped |= {name for name, mark in marks.items() if mark.state == "skipped"}

    def _check_streams(self, pending: set[str], streams: dict[str, Any]) -> set[str]:
        """The tickets of which somebody has planted a copy."""
        copied: set[str] = set()
        for stream, rows in streams.items():
            entries = {entry.decode(): fields for entry, fields in rows}
            pending -= entries.keys()
            pointed = {mark.entry_id: name for name, mark in self.marks.items() if self._home(name, mark) == stream}
            assert pointed.keys() <= entries.keys(), f"lost from {stream}: {pointed.keys() - entries.keys()}"
            for entry, name in pointed.items():
                assert entries[entry][b"id"].decode() == name
                assert stream not in ANSWERS or entries[entry][b"group"] == encode(self.groups[name, entry][1])
            foreign = entries.keys() - pointed.keys()
            if stream == "dead_letters":
                assert len(foreign) <= len(self.planted), f"nobody's entries in dead: {foreign}"
            else:
                assert foreign <= self.planted, f"nobody's entries in {stream}: {foreign - self.planted}"
                copied |= {entries[entry].get(b"id", b"?").decode() for entry in foreign}
        assert not pending, f"leased, and gone: {pending}"
        return copied

    def _check_versions(self, tickets: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        """What is announced is there, and no ticket asks for what is not announced."""
        found = {name.decode(): value.decode() for name, value in self.client.hgetall(self.keys.weights).items()}
        if not found:  # of Redis' second life
            assert self.was_lost or self.life is None
            return
        version, folder = int(found["version"]), Path(found["folder"])
        assert version >= self.announced, "versions only grow"
        self.announced = version
        if folder.exists():  # else another learner has taken up the run
            manifest = (version_folder(folder, version) / MANIFEST_FILE).read_bytes()
            assert decode_manifest(manifest, found["sha256"]).version == version
        pointed = {mark.entry_id for mark in self.marks.values() if mark.state == "open"}
        for entry, fields in tickets:
            if entry.decode() in pointed and entry.decode() not in self.planted:
                assert decode_ticket(fields[b"ticket"]).min_weight_version <= version

    def _check_numbers(self, count: int) -> None:
        """The first `count` tickets of the data, and one replacement of every stale one, are somewhere."""
        newest = self._loadable()[-1:]
        if self.life is not None:
            line, waiting = self.life.line, self.life.loop.intake.source.ids_to_issue()
        else:
            line = self._line(newest[0]) if newest else Line()
            waiting = read_record(newest[0]).unfinished if newest else []
        stale = [parse_ticket_id(name) for name, state in line.states.items() if state == "stale"]
        names = [name._replace(reissue=1) for name in stale if not name.reissue]
        names += [TicketId("train", *divmod(number, NUM_PROMPTS)) for number in range(count)]
        gone = self.died | self.skipped | line.states.keys() if self.was_lost else set()
        known = self.marks.keys() | set(waiting) | gone
        assert not {str(name) for name in names} - known

    def _note(self, life: Life, num_noted: int) -> None:
        """What the learner has done since it had consumed `num_noted` groups."""
        loop, line = life
        for one in loop.intake.settlement_log.since_checkpoint[num_noted:]:
            kind, group = self.groups[one.ticket_id, one.entry_id]
            is_stale = group_staleness(group, line.step, loop.intake.version_steps).total > CONFIG.learner.max_staleness
            expected = "uniform" if kind == "uniform" else "stale" if is_stale else "trained"
            expected = expected if is_training(one.ticket_id) else "evaluated"
            assert one.state == expected and kind != "future", f"{one}: expected {expected} of {kind}"
            assert one.ticket_id not in line.states, f"{one}: it was {line.states[one.ticket_id]}"
            line.states[one.ticket_id] = one.state
        line.step = loop.progress.step
        assert loop.trainer.seen == line.trained or life is not self.life

    def _note_checkpoint(self, life: Life) -> None:
        for folder in checkpoint_folders(self.checkpoints):
            if folder.name not in self.saved:
                line, unfinished = self.begun[id(life.loop)]
                self.saved[folder.name] = line
                record, counts = read_record(folder), Counter(line.states.values())
                assert record.step == line.step
                assert all(record.counts.get(state, 0) == counts[state] for state in FINAL)
                assert unfinished <= {*record.unfinished}
                assert all(is_training(name) for name in record.unfinished)

    def _note_begin(self, life: Life, begin: Callable[..., None], *given: object) -> None:
        """What a checkpoint that begins now must hold, whenever it is written."""
        self._note(life, self.num_noted)
        self.num_noted = len(life.loop.intake.settlement_log.since_checkpoint)
        names = [name for name, mark in self._ledger().items() if mark.state in ("open", "answered")]
        unfinished = {name for name in names if name not in life.line.states and is_training(name)}
        self.begun[id(life.loop)] = copy.deepcopy(life.line), unfinished
        begin(*given)

    def _start_learner(self, fault: Fault | None = None) -> None:
        newest = self._loadable()[-1:]
        line = copy.deepcopy(self._line(newest[0])) if newest else Line()
        client, task = self.trap.guard(self.server.new_client()), Uneven(NUM_PROMPTS)
        try:
            with self.trap.armed(fault):
                connections = (client, self.keys, "http://x", task, Switches(), Waits())
                loop, _ = assembly.assemble(LearnerContext(CONFIG, self.folder, "", *connections))
                loop.publisher._is_on_hold = lambda: False  # or nothing would end the wait, in a single thread
                loop.publish_first()
                loop.intake.resume()
        except (Crash, redis.OutOfMemoryError):
            return
        except Fenced:
            assert self.trap.sprung == "frozen" and self._everything() == self.as_overtaken
            return
        assert loop.progress.step == line.step
        life, other = Life(loop, line), self.life if self.trap.sprung == "frozen" else None
        loop.checkpointer.begin = partial(self._note_begin, life, loop.checkpointer.begin)  # type: ignore[method-assign]
        if other is not None and other.loop.store.epoch > loop.store.epoch:
            self.sleeper = life
        else:
            assert other is None or other.loop.store.epoch < loop.store.epoch, "two learners have one epoch"
            self.life, self.sleeper, self.is_lost = life, other or self.sleeper, False
        self._note(life, 0)

    def _overtake(self) -> None:
        """The learner, which may be starting, sleeps, and another one starts."""
        if self.life is not None:
            self._note_checkpoint(self.life)
            self.sleeper = self.life
        elif self.loses_redis:
            self.interrupt("lose Redis")
        self._start_learner()
        self.as_overtaken = self._everything()

    def _act(self, name: str, fault: Fault | None = None) -> None:
        """The learner does one thing, and lives on if it can."""
        life, was_lost = self.life, self.is_lost
        assert life is not None
        taken = life.loop.intake
        try:
            with self.trap.armed(fault and fault._replace(at=fault.at % NUM_COMMANDS[name])):
                self._do(life, name)
        except (Crash, redis.OutOfMemoryError):
            self.life = None
        except RedisLost:
            assert was_lost
            self.life = None
        except Fenced:
            assert self.trap.sprung == "frozen"
        if self.trap.sprung == "frozen":
            assert self._everything() == self.as_overtaken, "a learner that was overtaken has changed something"
        self._note(life, self.num_noted)
        self._note_checkpoint(life)
        is_full = len(taken._pending.groups) >= 2 * CONFIG.learner.max_outstanding_groups
        if name == "turn" and self.life is life and not self.is_lost and not is_full:
            arrived = [one.entry for one in taken._pending.groups]
            seen = [*taken.settlement_log.since_checkpoint, *taken.settlement_log.checkpointed, *arrived]
            queued = {mark.entry_id for mark in self._ledger().values() if mark.state == "answered"}
            assert queued <= {one.entry_id for one in seen}, "groups that the learner does not see"

    def _do(self, life: Life, name: str) -> None:
        loop = life.loop
        self.num_noted = len(loop.intake.settlement_log.since_checkpoint)
        if name == "turn":
            loop.intake.poll_once()
        elif name == "look":
            loop.intake.poll_control_state()
        elif name == "step":
            loop._take_step()
        elif name == "publish":
            loop.publisher.wait()
        elif name == "write":
            loop.checkpointer.wait()
        elif name == "checkpoint":
            loop.checkpointer.is_due = True
            loop.checkpointer.begin_if_due()
        else:
            loop.evaluator.is_due = True
            loop._begin_evaluation_if_due()

    def _as_replica(self, act: Coroutine[Any, Any, Any], fault: Fault | None) -> Any:
        """None if it dies of it."""
        try:
            with self.trap.armed(fault):
                return self.server.runner.run(act)
        except (Crash, redis.OutOfMemoryError):
            return None

    def _lease(self, store: TicketStore, stream: str, count: int, is_claim: bool, fault: Fault | None = None) -> None:
        key = self._key(stream)
        act = store.claim(key, count, 0.0) if is_claim else store.lease(key, count, 0.001)
        self.leases += [(store, lease) for lease in self._as_replica(act, fault) or []]

    def _answer(self, store: TicketStore, lease: Lease, kind: str, fault: Fault | None = None) -> None:
        """What the lease still allows happens exactly once, or not at all if the replica has died before."""
        name, was, is_open = lease.ticket.id, self._ledger().get(lease.ticket.id), self._is_open(lease)
        if kind in ("fail", "future") and not is_training(name) and not name.endswith("-0"):
            kind = "mixed"  # an evaluation of which all is dead stops the learner
        version = {"old": 1, "future": FUTURE}.get(kind, self._version())
        rewards = (1.0, 1.0) if kind == "uniform" else (1.0, 0.0)
        group = Group(lease.ticket, [make_rollout(r, version=version) for r in rewards], "r", Timings(0, 0, 0))
        if kind == "fail":
            self._as_replica(store.fail(lease, "told to", CONFIG.generation.max_attempts), fault)
        elif kind == "hand back":
            self._as_replica(store.hand_back(lease), fault)
        else:
            moved = self._as_replica(store.commit(lease, group), fault)
            assert self.trap.sprung or moved == is_open
        mark = self._ledger().get(name)
        assert (mark != was) == is_open or self.trap.sprung in ("before", "full")
        if mark is not None and mark != was:
            self.groups[name, mark.entry_id] = (kind, group)
        if not self.is_lost:
            self._compare(self._ledger())

    def _version(self) -> int:
        """Of the weights that a replica has now."""
        return self.life.loop.versions.current if self.life else 1

    def _step_episode(self, played: StepwiseLease, step: Any, fault: Fault | None) -> None:
        if step == "the worker ends":
            self._advance(played, played.end_worker(), fault)
        elif step == "the replica drains":
            self._advance(played, played.cancel(), fault)
        elif step == "the replica dies":
            self._advance(played, played.cancel(), Fault("before", 0))
        else:
            self._advance(played, played.step(*step), fault)

    def _advance(self, played: StepwiseLease, act: Coroutine[Any, Any, None], fault: Fault | None) -> None:
        """While its episodes go on nothing is seen of them. A group has the episodes that finished, and no other."""
        lease, num_attempts = played.lease, CONFIG.environment.episode_attempts
        name, was, is_open = lease.ticket.id, self._ledger().get(lease.ticket.id), self._is_open(lease)
        with self.trap.armed(fault):
            self.server.runner.run(act)
        mark = self._ledger().get(name)
        assert played.task is not None
        if not played.task.done():
            assert mark == was and max(played.num_failed.values(), default=0) < num_attempts
            return
        self.played.remove(played)
        death = None if played.task.cancelled() else played.task.exception()
        assert isinstance(death, Crash | redis.OutOfMemoryError | None), death
        assert (mark != was) == is_open or self.trap.sprung in ("before", "full")
        if mark is not None and mark != was and mark.state == "answered":
            assert played.group is not None
            self.groups[name, mark.entry_id] = ("mixed", played.group)
        if played.group is not None:
            made = [(rollout.text, rollout.failed_episodes) for rollout in played.group.rollouts]
            assert made == [(played.finished[place], played.num_failed[place]) for place in range(len(made))]
            assert (
                len(made) == lease.ticket.num_completions and max(played.num_failed.values(), default=0) < num_attempts
            )
        if not self.is_lost:
            self._compare(self._ledger())

    def _round(self, kinds: Sequence[str] = ("mixed",)) -> None:
        """Whatever is open is claimed and answered, and a step is taken."""
        self._act("turn")
        num_leases = len(self.leases)
        for stream, is_claim in itertools.product(WORK, (False, True)):
            self._lease(self.replicas[0], stream, 100, is_claim)
        self._compare(self._ledger())
        for (store, lease), kind in zip(self.leases[num_leases:], itertools.cycle(kinds), strict=False):
            self._answer(store, lease, kind)
        self._act("turn")
        self._act("step")

    def _drain(self) -> None:
        if self.life is None or self.is_lost:
            self._start_learner()
        assert self.life is not None
        loop, line = self.life
        self._act("look")
        loop.intake.is_admitting = False
        for _ in range(20):
            self._round()
            self.check()
            if not any(mark.state == "open" for mark in self.marks.values()) and len(loop.intake._pending.groups) < G:
                break
        for name in ("write", *("checkpoint", "write") * 2):
            self._act(name)
        self.check()
        states = {name: mark.state for name, mark in self.marks.items() if mark.state in FINAL}
        assert states.items() <= line.states.items() and (self.was_lost or states == line.states)
        assert not any(mark.state == "open" for mark in self.marks.values())
        queued = {mark.entry_id for mark in self.marks.values() if mark.state == "answered"}
        assert len(queued) < G and queued == {arrived.entry.entry_id for arrived in loop.intake._pending.groups}
        _, _, pending, *streams = self._read()
        assert queued == {entry.decode() for rows in streams[:-1] for entry, _ in rows} and not pending

    def teardown(self) -> None:
        for played in [*self.played]:
            self._step_episode(played, "the replica dies", None)
        try:
            if sys.exc_info()[0] is None:
                self._drain()
        finally:
            self.client.delete(*vars(self.keys).values())
            shutil.rmtree(self.folder)

    def copy_of_redis(self) -> dict[bytes, bytes]:
        return {key: self.client.dump(key) for key in self.client.keys(f"headrace:{{{self.keys.run}}}:*")}

    def go_back(self, copied: dict[bytes, bytes]) -> None:
        """Redis becomes what it was when it was copied."""
        self.client.delete(*vars(self.keys).values())
        for key, content in copied.items():
            self.client.restore(key, 0, content)
        self.is_lost = self.was_lost = True
        self.marks = self._ledger()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _loadable(self) -> list[Path]:
        return [folder for folder in checkpoint_folders(self.checkpoints) if self.saved.get(folder.name)]

    def _line(self, folder: Path) -> Line:
        line = self.saved[folder.name]
        assert line is not None
        return line

    def _key(self, stream: str) -> str:
        key: str = getattr(self.keys, stream)
        return key

    def _home(self, name: str, mark: LedgerEntry) -> str:
        return HOMES[mark.state][not is_training(name)] if mark.entry_id else ""

    def _is_open(self, lease: Lease) -> bool:
        return self.marks.get(lease.ticket.id) == LedgerEntry("open", lease.entry_id)

    def _ledger(self) -> dict[str, LedgerEntry]:
        return {name.decode(): parse_ledger_entry(mark) for name, mark in self.client.hgetall(self.keys.ledger).items()}

    def _pending(self) -> dict[bytes, bytes]:
        """Leased entries, and whose they are."""
        found: dict[bytes, bytes] = {}
        for stream in WORK:
            with contextlib.suppress(redis.ResponseError):  # Redis is lost
                rows = self.client.xpending_range(self._key(stream), TICKET_GROUP, "-", "+", 1000)
                found |= {row["message_id"]: row["consumer"] for row in rows}
        return found

    def _read(self, *others: str) -> list[Any]:
        """The ledger, the cursor, what is leased, every stream."""
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(self.keys.ledger).hmget(self.keys.cursor, "epoch", "place")
        for stream in (*STREAMS, *others):
            pipe.xrange(self._key(stream))
        ledger, cursor, *streams = pipe.execute()
        return [ledger, cursor, self._pending(), *streams]

    def _everything(self) -> object:
        keys = self.keys
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(keys.learner).hgetall(keys.weights).hgetall(keys.versions).smembers(keys.retries)
        pipe.mget(keys.epoch, keys.write_number)
        return pipe.execute(), self._read("events")


@pytest.mark.timeout(0 if "HEADRACE_EXAMPLES" in os.environ else 3600)
def test_the_protocol_holds_whatever_happens(server: Server, tmp_path: Path) -> None:
    run_state_machine_as_test(
        lambda: Protocol(server, tmp_path / "run"),  # type: ignore[arg-type]  # a factory will do
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_learner_that_wakes_begins_a_checkpoint_of_what_it_had_consumed_and_never_writes_it(
    server: Server, tmp_path: Path
) -> None:
    protocol = Protocol(server, tmp_path / "run")
    protocol.first_start(safe_until=0)
    protocol.calm_round(kinds=["mixed"], is_saved=False, fault=None)
    protocol.interrupt(how="freeze")
    for name in ("checkpoint", "write"):
        protocol.wake(name=name)
        protocol.check()
    protocol.teardown()


@pytest.mark.parametrize("at", range(20))
def test_learners_that_start_at_once_have_different_epochs_though_redis_is_lost_between_them(
    server: Server, tmp_path: Path, at: int
) -> None:
    server.num_runs += at  # the runs share a server
    protocol = Protocol(server, tmp_path / "run")
    protocol.first_start(safe_until=0)
    protocol.calm_round(kinds=["mixed"], is_saved=True, fault=None)
    protocol.interrupt(how="kill")
    protocol.start(fault=Fault("frozen", at), loses_redis=True)
    protocol.check()
    protocol.calm_round(kinds=["mixed"], is_saved=True, fault=None)
    protocol.check()
    for name in NUM_COMMANDS if protocol.sleeper is not None else ():
        protocol.wake(name=name)
    protocol.teardown()


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_learner_ends_when_redis_goes_back_to_what_it_was_a_moment_ago(
    server: Server, tmp_path: Path, is_answered: bool
) -> None:
    """A server without `appendfsync always` was killed, or somebody restored a copy; no other learner has started.
    `is_answered`: the learner reads the second answer to a ticket, and has lost no write of its own."""
    server.num_runs += is_answered
    protocol = Protocol(server, tmp_path / "run")
    protocol.first_start(safe_until=0)
    for _ in range(3):  # until admission has no room
        protocol.learn(name="turn", fault=None)
        protocol.check()
    if is_answered:
        before = protocol.copy_of_redis()
    protocol.lease(how="lease", store=0, stream="tickets", count=4, fault=None)
    if not is_answered:
        before = protocol.copy_of_redis()
    for which in range(2):
        protocol.answer(which=which, is_late=False, kind="mixed", fault=None)
    protocol.learn(name="turn", fault=None)
    if not is_answered:
        protocol.learn(name="step", fault=None)
    protocol.go_back(before)
    protocol.lease(how="lease", store=0, stream="tickets", count=4, fault=None)
    for which in range(2):
        protocol.answer(which=which, is_late=False, kind="mixed", fault=None)
    protocol.learn(name="turn", fault=None)
    assert protocol.life is None, "it goes on, and trains the second answer as well"
    protocol.teardown()
