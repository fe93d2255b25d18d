"""Between Redis and the step: keeps tickets topped up, takes groups in, retires what must not be trained.

A thread of its own, so that admission and dynamic sampling go on while a step computes. Admission:
open tickets + groups not yet consumed <= (max_mean_staleness + 1) * groups_per_step, where a group is consumed when
it is trained (its step is over: its version is announced), uniform or stale. The check of max_staleness at packing is
what bounds its maximum.
A group is taken in only if the ledger points to its entry, so that no copy is ever trained.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.wire import Group, Heartbeat, WireError, decode_group
from headrace.common.wire.desired_state import DesiredState
from headrace.common.wire.ledger import LedgerEntry
from headrace.learner.algorithm.staleness import Staleness, group_staleness, step_of
from headrace.learner.intake.dropped import DropStatistics
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.held_out import Evaluation
from headrace.learner.intake.samples import DecidedGroup, SampleCollector
from headrace.learner.intake.settlements import SettlementLog
from headrace.learner.intake.validation import GroupLimits, GroupRejected, validate_group
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import Cursor, Entry, LearnerStore, QueueState, Settlement

READ_COUNT = 64
READ_BLOCK_S = 0.2
CONTROL_POLL_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class PendingGroup(NamedTuple):
    """A group that waits to be trained, or was picked for a batch."""

    entry: Entry
    group: Group
    staleness: Staleness
    """At the step that the intake knows as the learner's."""


class CheckpointDelta(NamedTuple):
    """What a checkpoint must record, all of one moment."""

    settlements: list[Settlement]
    earlier: list[Settlement]
    unfinished: list[str]
    cursor: Cursor
    counts: dict[str, int]
    unsettled_bytes: int
    """Of the groups of `settlements`."""


class CachedRedisState(NamedTuple):
    """What the thread last saw of Redis, for those who must not wait for it."""

    open_tickets: int = 0
    in_stream: int = 0
    unread_groups: int = 0
    """Of those in the stream."""
    replicas: tuple[Heartbeat, ...] = ()
    desired_state: DesiredState = DesiredState()

    @property
    def is_generation_paused(self) -> bool:
        """As ordered."""
        return self.desired_state.desired_replicas == 0 and not self.replicas


class Intake:
    """Shared between its thread and the loop; every public method may be called from either."""

    def __init__(
        self,
        config: RunConfig,
        store: LearnerStore,
        source: GroupSource,
        version_steps: dict[int, int],
        limits: Callable[[], GroupLimits],
        checkpointed: list[Settlement],
        switches: Switches,
    ) -> None:
        """`limits`: of this moment. `recorded`: by the checkpoint that the learner was taken up from."""
        self.config = config
        self.switches = switches
        self.store = store
        self.source = source
        self.version_steps = version_steps
        self.settlement_log = SettlementLog(checkpointed)
        self.is_admitting = True
        self.redis_state = CachedRedisState()
        self._limits = limits
        self._max_pending = 0
        self._step = self._version = 0
        self._num_in_training = 0
        """Groups that are trained, and whose version is not announced yet."""
        self._num_packed = 0
        """Groups of the batch that is being trained."""
        self._decided_rewards: list[float] = []
        self._newest: Group | None = None
        """The training group that arrived last, whatever became of it."""
        self._pending: deque[PendingGroup] = deque()
        self._evaluation: Evaluation | None = None
        self._samples = SampleCollector()
        self._drop_statistics = DropStatistics()
        self._control_polled_at = 0.0
        self._failure: BaseException | None = None
        self._is_without_room = False
        """No ticket is open and none may be issued until the learner has consumed groups."""
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="intake", daemon=True)
        self.configure(config)

    def configure(self, config: RunConfig) -> None:
        """From now on."""
        with self._changed:
            self.config = config
            self.source.configure(config)
            self._max_pending = max(self._max_pending, 2 * config.learner.max_outstanding_groups)

    def start(self) -> None:
        """Goes on where an earlier life has ended, in a thread of its own."""
        self.resume()
        self._thread.start()

    def resume(self) -> None:
        """Takes in what an earlier life had read beyond the checkpoint."""
        entries = self.settlement_log.resume_unsettled(self.store, self.store.read_unsettled())
        self._take_in(entries, self.store.marks([entry.ticket_id for entry in entries]))

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def advance(self, step: int) -> None:
        """The learner has trained `step` steps."""
        with self._changed:
            self._step = step
            self._pending = deque(one._replace(staleness=self._staleness(one.group)) for one in self._pending)
            self._samples.restart("trained", "uniform", "stale")

    def on_announced(self, version: int, num_groups: int = 0) -> None:
        """Replicas can find `version`; the step that made it is over, and with it the training of `num_groups`: further
        tickets may be issued at once, and ask for it."""
        with self._changed:
            self._version = version
            self._num_in_training -= num_groups
            self._make_room()

    def take_batch(self, timeout_s: float, is_interrupted: Callable[[], bool]) -> list[PendingGroup] | None:
        """`groups_per_step` fresh groups, or None when interrupted or after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._raise_failure()
                self._drop_stale()
                if len(self._pending) >= self.config.learner.groups_per_step:
                    self.settlement_log.discarded.clear()
                    self._num_packed = self.config.learner.groups_per_step
                    return [self._pending.popleft() for _ in range(self.config.learner.groups_per_step)]
                if is_interrupted() or time.monotonic() > deadline:
                    return None
                self._changed.wait(READ_BLOCK_S)

    def mark_trained(self, batch: list[PendingGroup]) -> None:
        """The weights have seen them; what is admitted in their place waits for `announced`."""
        with self._changed:
            self._num_in_training += len(batch)
            self._num_packed = 0
            for pending in batch:
                self.settlement_log.consume(pending.entry, pending.group, "trained")
                self._decided_rewards += pending.group.rewards
                self._samples.add(pending.group, "trained", self._step, pending.staleness.total)
            self._drop_statistics.add_trained([pending.group for pending in batch])
            _log_tickets("trained", [pending.entry.ticket_id for pending in batch], step=self._step)

    def newest_if_fresh(self) -> Group | None:
        """The group that arrived last, if some of its tokens are of the learner's step."""
        with self._changed:
            if self._newest is None or step_of(self._newest.newest_version, self.version_steps) != self._step:
                return None
            return self._newest

    def take_decided_rewards(self) -> list[float]:
        """Of all training completions that were decided since the last call: of the batch, and of uniform and stale
        groups."""
        with self._changed:
            rewards, self._decided_rewards = self._decided_rewards, []
            return rewards

    def take_drop_statistics(self) -> dict[str, float]:
        """How what was dropped compares with what is trained (`DropStatistics`), up to the step that is over."""
        with self._changed:
            return self._drop_statistics.end_step()

    def take_samples(self) -> list[DecidedGroup]:
        """Some of the groups that were decided since the last call."""
        with self._changed:
            return self._samples.take()

    def checkpoint_delta(self) -> CheckpointDelta:
        """What the next checkpoint must record."""
        with self._changed:
            log = self.settlement_log
            unfinished = log.unfinished(self.store) + self.source.ids_to_issue()
            settlements, counts = list(log.since_checkpoint), dict(log.counts)
            return CheckpointDelta(
                settlements, log.checkpointed, unfinished, self.source.cursor, counts, log.unsettled_bytes
            )

    def on_checkpointed(self, delta: CheckpointDelta) -> None:
        """A durable checkpoint has recorded `delta`: what the one before it recorded may leave Redis."""
        with self._changed:
            self.store.settle(self.settlement_log.checkpointed)
            self.settlement_log.on_checkpointed(len(delta.settlements), delta.unsettled_bytes)

    def begin_evaluation(self, step: int, version: int) -> None:
        """Issues the evaluation of `step`; one at a time."""
        tickets = self.source.evaluation_tickets(step, version)
        with self._changed:
            assert self._evaluation is None
            self._evaluation = Evaluation.of(step, version, tickets)
            self._samples.restart("evaluated")
        self.store.add_tickets(self.store.keys.eval, tickets)
        _log_tickets("issued for an evaluation", [ticket.id for ticket in tickets], version=version)

    @property
    def is_first_evaluation_open(self) -> bool:
        """Of the weights that the run begins with: some completions are still to come."""
        evaluation = self._evaluation
        return evaluation is not None and evaluation.step == 0 and not evaluation.is_done

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

    @property
    def is_recording_exhausted(self) -> bool:
        """A recording has nothing more to give, not even for the batch that waits."""
        with self._changed:
            if not self.source.is_exhausted or len(self._pending) >= self.config.learner.groups_per_step:
                return False
            return self.redis_state.in_stream == self.settlement_log.num_consumed_in(self.store.keys.groups) + len(
                self._pending
            )

    def describe_wait(self) -> str:
        """From what was last seen: never waits for Redis."""
        if not self.source.is_recording and not self.redis_state.replicas:
            return "no live replica"
        if self.settlement_log.discarded.total() >= 2 * self.config.learner.max_outstanding_groups:
            return f"no group could be trained since the last step: {dict(self.settlement_log.discarded)}"
        states = ", ".join(
            f"{r.replica} {r.state}{f' ({r.reason})' if r.reason else ''}" for r in self.redis_state.replicas
        )
        return (
            f"{len(self._pending)} of {self.config.learner.groups_per_step} groups, "
            f"{self.redis_state.open_tickets} open tickets, {self.redis_state.in_stream} groups in the stream; "
            f"replicas: {states or 'none'}; so far {dict(self.settlement_log.counts)}"
        )

    def poll_once(self) -> None:
        """One turn of the thread: take in, admit, look around now and then."""
        is_full = len(self._pending) >= self._max_pending
        entries = [] if is_full else self.store.read(READ_COUNT, self._block_s())
        look = self.store.queue_state([entry.ticket_id for entry in entries])
        self._take_in(entries, look.marks)
        self._issue_tickets(look)
        if self.switches.unpersisted or time.monotonic() > self._control_polled_at + CONTROL_POLL_INTERVAL_S:
            self.poll_control_state()

    def sync_desired_state(self) -> None:
        """Writes what Redis does not know yet, then obeys what stands there."""
        if unpersisted := self.switches.unpersisted:
            self.store.write_control(unpersisted)
            self.switches.mark_persisted(unpersisted)
        desired_state = self.store.desired_state()
        self.redis_state = self.redis_state._replace(desired_state=desired_state)
        self.switches.sync_from(desired_state)

    def poll_control_state(self) -> None:
        """What is ordered, which replicas live, which evaluation tickets died, which dead ones to issue again."""
        self._control_polled_at = time.monotonic()
        self.sync_desired_state()
        self.redis_state = self.redis_state._replace(replicas=tuple(self.store.replicas()))
        self._note_dead_evaluation_tickets()
        for name in self.store.retry_requests():
            self._requeue_dead(name)

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                self.poll_once()
        except BaseException as error:  # noqa: BLE001 - a thread's top: raised again where the loop waits
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _issue_tickets(self, look: QueueState) -> None:
        """Only this thread issues tickets, so that there are at most as many now as when it looked."""
        with self._changed:
            num_consumed = self.settlement_log.num_consumed_in(self.store.keys.groups)
            self.redis_state = self.redis_state._replace(
                open_tickets=look.open_tickets,
                in_stream=look.in_stream,
                unread_groups=max(0, look.in_stream - num_consumed - len(self._pending) - self._num_packed),
            )
            room = (
                self.config.learner.max_outstanding_groups
                - look.open_tickets
                - (look.in_stream - num_consumed)
                - self._num_in_training
            )
            self._is_without_room = room <= 0 and look.open_tickets == 0
            if room > 0 and self.is_admitting and not self.switches.paused.is_set():
                issued = self.source.issue(self.store, room, self._step, self._version)
                self.settlement_log.issued(issued.ticket_ids)
                self.settlement_log.counts.update(one.state for one in issued.unusable)
                _log_tickets("issued", issued.ticket_ids, version=self._version)
                for one in issued.unusable:
                    _log.warning("no ticket (%s): %s", one.state, one.reason, extra={"ticket": one.ticket_id})

    def _take_in(self, entries: list[Entry], marks: list[LedgerEntry | None]) -> None:
        limits = self._limits()
        accepted: dict[str, list[str]] = defaultdict(list)
        for entry, mark in zip(entries, marks, strict=True):
            group = None
            try:
                if mark != LedgerEntry("queued", entry.entry_id):
                    raise GroupRejected(f"the ledger knows no such group: it says {mark or 'nothing'}")
                group = decode_group(entry.payload)
                validate_group(group, entry.ticket_id, limits)
            except (WireError, GroupRejected) as error:
                self._dead_letter(entry, str(error), group)
            else:
                accepted[self._accept(entry, group)].append(entry.ticket_id)
        for what, ticket_ids in accepted.items():
            _log_tickets(what, ticket_ids)

    def _dead_letter(self, entry: Entry, reason: str, group: Group | None) -> None:
        self.store.dead_letter(entry, reason)
        with self._changed:
            self.settlement_log.counts["dead"] += 1  # the ticket may live: this may have been a copy
            if group is not None and group.ticket.kind == "train":
                self._drop_statistics.add_dropped(group)

    def _accept(self, entry: Entry, group: Group) -> str:
        """What became of it, for the log."""
        with self._changed:
            if group.ticket.kind == "eval":
                if self._evaluation is not None:
                    self._evaluation.collect(group, self.version_steps)
                self.settlement_log.consume(entry, group, "evaluated")
                self._samples.add(group, "evaluated", self._step, None)
            else:
                self._newest = group
                if self.config.actor.dynamic_sampling and group.is_uniform(self.config.actor.truncated):
                    self.settlement_log.consume(entry, group, "uniform")
                    self._decided_rewards += group.rewards
                    self._samples.add(group, "uniform", self._step, self._staleness(group).total)
                    return "arrived, uniform"
                self._pending.append(PendingGroup(entry, group, self._staleness(group)))
            self._changed.notify_all()
        return "arrived" if group.ticket.kind == "train" else "arrived, evaluated"

    def _staleness(self, group: Group) -> Staleness:
        """At the learner's step of this moment."""
        return group_staleness(group, self._step, self.version_steps)

    def _block_s(self) -> float:
        """How long to wait for groups in Redis. While none can come it waits here instead, for room, so that the next
        tickets are issued as soon as there is some."""
        with self._changed:
            if not self._is_without_room or self.is_evaluating:
                return READ_BLOCK_S
            self._changed.wait_for(lambda: not self._is_without_room, READ_BLOCK_S)
            return 0.0

    def _make_room(self) -> None:
        """Groups were consumed by the loop: further tickets may be issued at once."""
        self._is_without_room = False
        self._changed.notify_all()

    def _drop_stale(self) -> None:
        """What waits too long is replaced, once."""
        learner, kept = self.config.learner, deque[PendingGroup]()
        for pending in self._pending:
            if pending.staleness.total <= learner.max_staleness or learner.stale_policy == "train":
                kept.append(pending)
                continue
            entry, group, staleness = pending
            self.settlement_log.consume(entry, group, "stale")
            self._decided_rewards += group.rewards
            self._samples.add(group, "stale", self._step, staleness.total)
            self._drop_statistics.add_dropped(group)
            self.source.replace_stale(group.ticket)
            _log.info("stale by %d steps, to be replaced", staleness.total, extra={"ticket": entry.ticket_id})
        if len(kept) < len(self._pending):
            self._make_room()
        self._pending = kept

    def _requeue_dead(self, name: str) -> None:
        try:
            (ticket,) = self.source.rebuild([name], self._step, self._version)
            died = self.store.dead_ticket(name)
            if died is not None and (died.prompt_tokens, died.reference) != (ticket.prompt_tokens, ticket.reference):
                raise ValueError(f"ticket {name}: the data have another prompt there now")
        except ValueError as error:
            _log.warning("not issued again: %s", error, extra={"ticket": name})
            self.store.execute([("SREM", self.store.keys.retries, name)])
            return
        if self.store.requeue_dead(ticket):
            with self._changed:
                self.settlement_log.issued([name])
            _log_tickets("issued again, as asked", [name])

    def _note_dead_evaluation_tickets(self) -> None:
        with self._changed:
            names = sorted(self._evaluation.waiting_for) if self._evaluation is not None else []
            if self._evaluation is None or not names:
                return
            for name, mark in zip(names, self.store.marks(names), strict=True):
                if mark is not None and mark.state == "dead":
                    self._evaluation.mark_dead(name, self.store.dead_reason(mark))
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _log_tickets(what: str, ticket_ids: list[str], **fields: int) -> None:
    if ticket_ids:
        _log.info(what, extra={"tickets": ticket_ids, **fields})
