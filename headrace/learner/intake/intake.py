"""Between Redis and the step: issues tickets, takes groups in, and gives the loop batches of them.

A thread of its own, so that admission and dynamic sampling go on while a step computes. Admission:
open tickets + groups not yet consumed <= (max_mean_staleness + 1) * groups_per_step. A group is consumed when it is
uniform, stale, or trained, that is, when the version that its step made is announced. Admission bounds the mean
staleness; the check against max_staleness at packing bounds the maximum.
A group is taken in only if the ledger points to its entry, so that no duplicate is ever trained.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.wire import Group, WireError, decode_group
from headrace.common.wire.ledger import LedgerEntry
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.lock import IntakeLock
from headrace.learner.intake.outcomes import GroupOutcomes
from headrace.learner.intake.pending_groups import PendingGroup, PendingGroups
from headrace.learner.intake.running_evaluation import RunningEvaluation
from headrace.learner.intake.settlements import SettlementLog
from headrace.learner.intake.validation import GroupLimits, GroupRejected, validate_group
from headrace.learner.steering.control_state import ControlState
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, Entry, QueueState, Settlement

READ_COUNT = 64
READ_BLOCK_S = 0.2
CONTROL_POLL_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class CheckpointDelta(NamedTuple):
    """What a checkpoint must record of the groups and tickets, all at one moment."""

    settlements: list[Settlement]
    earlier: list[Settlement]
    unfinished: list[str]
    cursor: Cursor
    counts: dict[str, int]
    unsettled_bytes: int
    """The size of the groups in `settlements`."""


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
        """`limits`: returns those of now. `checkpointed`: recorded by the checkpoint that the learner resumes from."""
        self.config = config
        self.switches = switches
        self.store = store
        self.source = source
        self.version_steps = version_steps
        self.is_admitting = True
        self.control_state = ControlState(store, switches)
        self.queue = QueueState(0, 0, [])
        """As last read from Redis."""
        self.num_unread = 0
        """Groups in the stream that were not read yet."""
        self._lock = IntakeLock()
        self.settlement_log = SettlementLog(checkpointed)
        self.outcomes = GroupOutcomes(self.settlement_log, self._lock)
        self.evaluation = RunningEvaluation(store, source, version_steps, self.outcomes, self._lock)
        self._limits = limits
        self._max_pending = 0
        self._version = 0
        self._num_in_training = 0
        """Groups that were trained, and whose version is not announced yet."""
        self._num_packed = 0
        """Groups of the batch that is being trained."""
        self._pending = PendingGroups(config, source, version_steps, self.outcomes)
        self._control_polled_at = 0.0
        self._is_without_room = False
        """No ticket is open, and none may be issued until the learner has consumed groups."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="intake", daemon=True)
        self.configure(config)

    def configure(self, config: RunConfig) -> None:
        """`config` applies from now on."""
        with self._lock:
            self.config = self._pending.config = config
            self.source.configure(config)
            self._max_pending = max(self._max_pending, 2 * config.learner.max_outstanding_groups)

    def start(self) -> None:
        """Resumes, and starts the thread."""
        self.resume()
        self._thread.start()

    def resume(self) -> None:
        """Takes in the groups that an earlier learner of the run had read and no checkpoint has recorded."""
        entries = self.settlement_log.resume_unsettled(self.store, self.store.read_unsettled())
        self._take_in(entries, self.store.ledger_entries([entry.ticket_id for entry in entries]))

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def advance(self, step: int) -> None:
        """The learner has trained `step` steps."""
        with self._lock:
            self._pending.advance(step)

    def on_announced(self, version: int, num_groups: int = 0) -> None:
        """Replicas can find `version`, whose step trained `num_groups` groups: as many tickets may be issued at once,
        and ask for it."""
        with self._lock:
            self._version = version
            self._num_in_training -= num_groups
            self._make_room()

    def take_batch(self, timeout_s: float, is_interrupted: Callable[[], bool]) -> list[PendingGroup] | None:
        """`groups_per_step` fresh groups; None when interrupted or after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                self._lock.raise_failure()
                if self._pending.drop_stale():
                    self._make_room()
                if self._pending.has_batch:
                    self.settlement_log.discarded.clear()
                    self._num_packed = self.config.learner.groups_per_step
                    return self._pending.pop_batch()
                if is_interrupted() or time.monotonic() > deadline:
                    return None
                self._lock.wait(READ_BLOCK_S)

    def mark_trained(self, batch: list[PendingGroup]) -> None:
        """The step has trained `batch`; tickets in its place are issued after `on_announced`."""
        with self._lock:
            self._num_packed = 0
            self._num_in_training += len(batch)
            for entry, group, staleness in batch:
                self.outcomes.settle(entry, group, "trained", self._pending.step, staleness.total)
            _log_tickets("trained", [pending.entry.ticket_id for pending in batch], step=self._pending.step)

    def newest_if_fresh(self) -> Group | None:
        """The training group that arrived last, if some of its tokens are of the learner's step."""
        with self._lock:
            return self._pending.newest_if_fresh()

    def checkpoint_delta(self) -> CheckpointDelta:
        """What the next checkpoint must record."""
        with self._lock:
            log = self.settlement_log
            unfinished = log.unfinished(self.store) + self.source.ids_to_issue()
            settlements, counts = list(log.since_checkpoint), dict(log.counts)
            return CheckpointDelta(
                settlements, log.checkpointed, unfinished, self.source.cursor, counts, log.unsettled_bytes
            )

    def on_checkpointed(self, delta: CheckpointDelta) -> None:
        """A durable checkpoint has recorded `delta`: the groups that the one before it recorded leave Redis."""
        with self._lock:
            self.store.settle(self.settlement_log.checkpointed)
            self.settlement_log.on_checkpointed(len(delta.settlements), delta.unsettled_bytes)

    @property
    def is_recording_exhausted(self) -> bool:
        """The source is a recording, and what is left of it does not fill a batch."""
        with self._lock:
            if not self.source.is_exhausted or self._pending.has_batch:
                return False
            return self._num_unconsumed(self.queue) == len(self._pending.groups)

    def describe_wait(self) -> str:
        """Why there is no batch, from what was last read; does not wait for Redis."""
        if not self.source.is_recording and not self.control_state.replicas:
            return "no live replica"
        if self.settlement_log.discarded.total() >= 2 * self.config.learner.max_outstanding_groups:
            return f"no group could be trained since the last step: {dict(self.settlement_log.discarded)}"
        states = ", ".join(
            f"{r.replica} {r.state}{f' ({r.reason})' if r.reason else ''}" for r in self.control_state.replicas
        )
        return (
            f"{len(self._pending.groups)} of {self.config.learner.groups_per_step} groups, "
            f"{self.queue.open_tickets} open tickets, {self.queue.in_stream} groups in the stream; "
            f"replicas: {states or 'none'}; so far {dict(self.settlement_log.counts)}"
        )

    def poll_once(self) -> None:
        """One iteration of the thread: takes groups in, issues tickets, and polls the control state when it is due."""
        is_full = len(self._pending.groups) >= self._max_pending
        entries = [] if is_full else self.store.read(READ_COUNT, self._block_s())
        queue = self.store.queue_state([entry.ticket_id for entry in entries])
        self._take_in(entries, queue.ledger_entries)
        self._issue_tickets(queue)
        if self.switches.unpersisted or time.monotonic() > self._control_polled_at + CONTROL_POLL_INTERVAL_S:
            self.poll_control_state()

    def poll_control_state(self) -> None:
        """Reads the desired state, the replicas, dead evaluation tickets, and which dead tickets to issue again."""
        self._control_polled_at = time.monotonic()
        self.control_state.poll()
        self.evaluation.note_dead_tickets()
        for name in self.store.retry_requests():
            self._requeue_dead(name)

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                self.poll_once()
        except BaseException as error:  # noqa: BLE001 - a thread's top: raised again where the loop waits
            self._lock.fail(error)

    def _issue_tickets(self, queue: QueueState) -> None:
        """Issues what admission allows. Only this thread issues tickets, so no more are open than `queue` says."""
        with self._lock:
            self.queue, num_unconsumed = queue, self._num_unconsumed(queue)
            self.num_unread = max(0, num_unconsumed - len(self._pending.groups) - self._num_packed)
            outstanding = queue.open_tickets + num_unconsumed + self._num_in_training
            room = self.config.learner.max_outstanding_groups - outstanding
            self._is_without_room = room <= 0 and queue.open_tickets == 0
            if room > 0 and self.is_admitting and not self.switches.paused.is_set():
                issued = self.source.issue(self.store, room, self._pending.step, self._version)
                self.settlement_log.add_issued(issued.ticket_ids)
                self.settlement_log.counts.update(one.state for one in issued.unusable)
                _log_tickets("issued", issued.ticket_ids, version=self._version)
                for one in issued.unusable:
                    _log.warning("no ticket (%s): %s", one.state, one.reason, extra={"ticket": one.ticket_id})

    def _num_unconsumed(self, queue: QueueState) -> int:
        return queue.in_stream - self.settlement_log.num_consumed_in(self.store.keys.groups)

    def _take_in(self, entries: list[Entry], known: list[LedgerEntry | None]) -> None:
        limits = self._limits()
        accepted: dict[str, list[str]] = defaultdict(list)
        for entry, ledger_entry in zip(entries, known, strict=True):
            group = None
            try:
                if ledger_entry != LedgerEntry("answered", entry.entry_id):
                    raise GroupRejected(f"the ledger knows no such group: it says {ledger_entry or 'nothing'}")
                group = decode_group(entry.payload)
                validate_group(group, entry.ticket_id, limits)
            except (WireError, GroupRejected) as error:
                self.store.dead_letter(entry, str(error))
                with self._lock:
                    self.outcomes.reject(group)
            else:
                accepted[self._accept(entry, group)].append(entry.ticket_id)
        for what, ticket_ids in accepted.items():
            _log_tickets(what, ticket_ids)

    def _accept(self, entry: Entry, group: Group) -> str:
        """Returns the group's outcome, for the log."""
        with self._lock:
            self.settlement_log.take_in(entry)
            if group.ticket.kind == "eval":
                self.evaluation.collect(group)
                self.outcomes.settle(entry, group, "evaluated", self._pending.step, None)
            elif not self._pending.add(entry, group):
                return "arrived, uniform"
            self._lock.notify_all()
        return "arrived" if group.ticket.kind == "train" else "arrived, evaluated"

    def _block_s(self) -> float:
        """How long to wait for groups in Redis. While none can come, this waits for room instead, so that the next
        tickets are issued as soon as there is some."""
        with self._lock:
            if not self._is_without_room or self.evaluation.is_running:
                return READ_BLOCK_S
            self._lock.wait_for(lambda: not self._is_without_room, READ_BLOCK_S)
            return 0.0

    def _make_room(self) -> None:
        """The loop has consumed groups: further tickets may be issued at once."""
        self._is_without_room = False
        self._lock.notify_all()

    def _requeue_dead(self, name: str) -> None:
        try:
            (ticket,) = self.source.rebuild([name], self._pending.step, self._version)
            died = self.store.dead_ticket(name)
            if died is not None and (died.prompt_tokens, died.reference) != (ticket.prompt_tokens, ticket.reference):
                raise ValueError(f"ticket {name}: the data have another prompt there now")
        except ValueError as error:
            _log.warning("not issued again: %s", error, extra={"ticket": name})
            self.store.execute([("SREM", self.store.keys.retries, name)])
            return
        if self.store.requeue_dead(ticket):
            with self._lock:
                self.settlement_log.add_issued([name])
            _log_tickets("issued again, as asked", [name])


def _log_tickets(what: str, ticket_ids: list[str], **fields: int) -> None:
    if ticket_ids:
        _log.info(what, extra={"tickets": ticket_ids, **fields})
