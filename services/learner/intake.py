"""Between Redis and the step: keeps tickets topped up, takes groups in, retires what must not be trained.

A thread of its own, so that admission and dynamic sampling go on while a step computes. Admission:
open tickets + groups not yet consumed <= (max_staleness + 1) * groups_per_step, where a group is consumed when it
is trained (its step is over), uniform or stale. The check of staleness at packing is what bounds its maximum.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from common.config import RunConfig
from common.wire import Group, Ticket, TicketState, WireError, decode_group
from services.learner.evaluation import Evaluation
from services.learner.prompts import TicketSource
from services.learner.staleness import Staleness, group_staleness
from services.learner.store import Entry, LearnerStore, Settlement

READ_COUNT = 64
READ_BLOCK_S = 0.2
DEAD_CHECK_S = 2.0


class Arrived(NamedTuple):
    """A group that waits to be trained, or was picked for a batch."""

    entry: Entry
    group: Group
    staleness: Staleness = Staleness(0, 0)


class Starved(RuntimeError):
    """No step could be taken for too long; the text says what was missing."""


class Intake:
    """Shared between its thread and the loop; every public method may be called from either."""

    def __init__(
        self,
        config: RunConfig,
        store: LearnerStore,
        source: TicketSource,
        version_steps: dict[int, int],
        recorded: list[Settlement],
    ) -> None:
        """`recorded`: by the checkpoint that the learner was taken up from."""
        self.config = config
        self.store = store
        self.source = source
        self.version_steps = version_steps
        self.counts: Counter[str] = Counter()
        self.is_admitting = True
        self._consumed: list[Settlement] = []
        """Since the last checkpoint."""
        self._recorded = recorded
        """By the last checkpoint; still in Redis until the next one."""
        self._step = self._version = 0
        self._sampled_rewards: list[float] = []
        self._arrived: deque[Arrived] = deque()
        self._reissues: deque[Ticket] = deque()
        self._evaluation: Evaluation | None = None
        self._looked_for_dead = 0.0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="intake", daemon=True)

    def start(self) -> None:
        """Takes in what an earlier life had read beyond the checkpoint, then reads on."""
        recorded = {(one.stream, one.entry_id) for one in self._recorded}
        for entry in self.store.read_pending():
            if (entry.stream, entry.entry_id) not in recorded:
                self._take_in(entry)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def advance(self, step: int, version: int) -> None:
        """The learner has completed `step` steps and published `version`."""
        with self._changed:
            self._step, self._version = step, version

    def take_batch(self, timeout_s: float, is_interrupted: Callable[[], bool]) -> list[Arrived] | None:
        """`groups_per_step` fresh groups, or None when interrupted. Raises `Starved` after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._raise_failure()
                self._drop_stale()
                if len(self._arrived) >= self.config.learner.groups_per_step:
                    return [self._arrived.popleft() for _ in range(self.config.learner.groups_per_step)]
                if is_interrupted():
                    return None
                if time.monotonic() > deadline:
                    raise Starved(f"no step for {timeout_s:.0f} s: {self.why_waiting()}")
                self._changed.wait(READ_BLOCK_S)

    def mark_trained(self, batch: list[Arrived]) -> None:
        with self._changed:
            for arrived in batch:
                self._consume(arrived.entry, "trained")

    def take_sampled_rewards(self) -> list[float]:
        """Of all training completions that arrived since the last call, those of uniform groups included."""
        with self._changed:
            rewards, self._sampled_rewards = self._sampled_rewards, []
            return rewards

    def consumed(self) -> list[Settlement]:
        """What the next checkpoint must record."""
        with self._changed:
            return list(self._consumed)

    def checkpointed(self, consumed: list[Settlement]) -> None:
        """A durable checkpoint has recorded `consumed`: what the one before it recorded may leave Redis."""
        with self._changed:
            self.store.settle(self._recorded)
            self._recorded = consumed
            del self._consumed[: len(consumed)]

    def begin_evaluation(self, step: int, version: int) -> None:
        """Issues the evaluation of `step`; one at a time."""
        tickets = self.source.evaluation(step, version)
        with self._changed:
            assert self._evaluation is None
            self._evaluation = Evaluation.of(step, tickets)
        self.store.add_tickets(self.store.keys.eval, tickets)

    @property
    def is_evaluating(self) -> bool:
        return self._evaluation is not None

    def finished_evaluation(
        self, timeout_s: float = 0.0, is_interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The result once it is complete; None if there is none after `timeout_s` seconds, or when interrupted."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._evaluation is not None:
                self._raise_failure()
                if self._evaluation.is_done:
                    result = self._evaluation.result()
                    self._evaluation = None
                    return result
                remaining = deadline - time.monotonic()
                if remaining <= 0 or is_interrupted():
                    return None
                self._changed.wait(min(remaining, READ_BLOCK_S))
        return None

    def why_waiting(self) -> str:
        open_tickets, in_stream = self.store.num_open_tickets_and_groups()
        replicas = self.store.replicas()
        states = ", ".join(f"{r.replica} {r.state}{f' ({r.reason})' if r.reason else ''}" for r in replicas)
        return (
            f"{len(self._arrived)} of {self.config.learner.groups_per_step} groups, {open_tickets} open tickets, "
            f"{in_stream} groups in the stream; replicas: {states or 'none'}; so far {dict(self.counts)}"
        )

    def turn(self) -> None:
        """One turn of the thread: admit, take in, look after evaluation tickets that died."""
        self._top_up()
        for entry in self.store.read(READ_COUNT, READ_BLOCK_S):
            self._take_in(entry)
        if self._evaluation is not None and time.monotonic() > self._looked_for_dead + DEAD_CHECK_S:
            self.give_up_dead_evaluations()

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                self.turn()
        except Exception as error:  # noqa: BLE001 - a thread's top: raised again where the loop waits
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _top_up(self) -> None:
        with self._changed:
            open_tickets, in_stream = self.store.num_open_tickets_and_groups()
            kept = sum(one.stream == self.store.keys.groups for one in (*self._consumed, *self._recorded))
            waiting = in_stream - kept
            room = self.config.learner.max_outstanding_groups - open_tickets - waiting
            if room <= 0 or not self.is_admitting:
                return
            again = [self._reissues.popleft() for _ in range(min(room, len(self._reissues)))]
            tickets = [self.source.reissue(ticket, self._step, self._version) for ticket in again]
            tickets += self.source.next_train(room - len(again), self._step, self._version)
            self.store.add_tickets(self.store.keys.tickets, tickets, self.source.cursor)

    def _take_in(self, entry: Entry) -> None:
        try:
            group = decode_group(entry.payload)
            staleness = group_staleness(group, self._step, self.version_steps)
        except (WireError, ValueError) as error:
            self.store.bury(entry, str(error))
            with self._changed:
                self.counts["dead"] += 1
            return
        with self._changed:
            self.counts["generated_tokens"] += group.num_trained_tokens
            if group.ticket.kind == "eval":
                if self._evaluation is not None:
                    self._evaluation.collect(group, self.version_steps)
                self._consume(entry, "evaluated")
                self._changed.notify_all()
                return
            self._sampled_rewards += group.rewards
            if self.config.actor.dynamic_sampling and group.is_uniform:
                self._consume(entry, "uniform")
            else:
                self._arrived.append(Arrived(entry, group, staleness))
            self._changed.notify_all()

    def _drop_stale(self) -> None:
        """Measures staleness at the learner's step of this moment: what waits too long is replaced, once."""
        kept: deque[Arrived] = deque()
        for entry, group, _ in self._arrived:
            staleness = group_staleness(group, self._step, self.version_steps)
            if staleness.total <= self.config.learner.max_staleness or self.config.learner.stale_policy == "train":
                kept.append(Arrived(entry, group, staleness))
                continue
            self._consume(entry, "stale")
            if group.ticket.reissues == 0:
                self._reissues.append(group.ticket)
        self._arrived = kept

    def _consume(self, entry: Entry, state: TicketState) -> None:
        self._consumed.append(Settlement(entry.stream, entry.entry_id, entry.ticket_id, state))
        self.counts[state] += 1

    def give_up_dead_evaluations(self) -> None:
        with self._changed:
            self._looked_for_dead = time.monotonic()
            names = sorted(self._evaluation.waiting_for) if self._evaluation is not None else []
            if self._evaluation is None or not names:
                return
            for name, state in zip(names, self.store.states(names), strict=True):
                if state == "dead":
                    self._evaluation.give_up(name)
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
