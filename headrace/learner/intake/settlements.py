"""The log of settlements: which state each consumed group has, and what the next checkpoint must record of it.

A consumed group stays in Redis until the checkpoint after the one that recorded it: `since_checkpoint` is what the next
checkpoint will record, `checkpointed` what the last one did. Needs a lock around it if several threads use it.
"""

from collections import Counter
from collections.abc import Sequence

from headrace.common.wire import Group, TicketState
from headrace.common.wire.ledger import parse_ticket_id
from headrace.learner.store.fenced_redis import RedisLost
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Entry, Settlement


class SettlementLog:
    def __init__(self, checkpointed: list[Settlement]) -> None:
        """`checkpointed`: what the checkpoint that the learner resumes from recorded."""
        self.counts: Counter[str] = Counter()
        """Of the whole run: groups by state, and generated tokens."""
        self.since_checkpoint: list[Settlement] = []
        self.checkpointed = checkpointed
        self.unsettled_bytes = 0
        """The size of the groups in Redis that the next checkpoint will record."""
        self.discarded: Counter[str] = Counter()
        """Uniform and stale groups since the last batch."""
        self._taken_in = {one.ticket_id: one.entry_id for one in checkpointed}
        """The entry of each ticket's group, for the groups taken in that no `on_checkpointed` has passed yet."""
        self._unfinished: set[str] = set()
        self._num_consumed = Counter(one.stream for one in checkpointed)
        """By stream. Kept, because each iteration of the intake asks for it, and must not count the batches of 64
        replicas each time."""

    def resume_unsettled(self, store: LearnerStore, unsettled: Sequence[Entry]) -> list[Entry]:
        """Takes over the tickets that earlier learners of the run issued and did not finish. Returns those of the
        `unsettled` entries that no checkpoint has recorded; a Redis that went back in time may lack recorded ones."""
        recorded = {(one.stream, one.entry_id) for one in self.checkpointed}
        is_recorded = [(entry.stream, entry.entry_id) in recorded for entry in unsettled]
        self._num_consumed = Counter(entry.stream for entry, known in zip(unsettled, is_recorded, strict=True) if known)
        names = {name for name in store.unfinished() if parse_ticket_id(name).kind == "train"}
        self._unfinished |= names - {one.ticket_id for one in self.checkpointed}
        return [entry for entry, known in zip(unsettled, is_recorded, strict=True) if not known]

    def add_issued(self, ticket_ids: list[str]) -> None:
        self._unfinished |= set(ticket_ids)

    def take_in(self, entry: Entry) -> None:
        """Raises `RedisLost` if another group of that ticket was taken in: Redis went back and issued it again."""
        if self._taken_in.setdefault(entry.ticket_id, entry.entry_id) != entry.entry_id:
            raise RedisLost(f"Redis has lost the first answer to ticket {entry.ticket_id}, and has another one")

    def consume(self, entry: Entry, group: Group, state: TicketState) -> None:
        self.since_checkpoint.append(Settlement(entry.stream, entry.entry_id, entry.ticket_id, state))
        self._unfinished.discard(entry.ticket_id)
        self._num_consumed[entry.stream] += 1
        self.unsettled_bytes += len(entry.payload)
        self.counts[state] += 1
        if state in ("uniform", "stale"):
            self.discarded[state] += 1
        self.counts["generated_tokens"] += group.num_trained_tokens

    def num_consumed_in(self, stream: str) -> int:
        """The consumed groups that are still in the stream."""
        return self._num_consumed[stream]

    def unfinished(self, store: LearnerStore) -> list[str]:
        """The training tickets that are open or answered, and not consumed."""
        names = sorted(self._unfinished)
        found = [
            name
            for name, known in zip(names, store.ledger_entries(names), strict=True)
            if known and known.state in ("open", "answered")
        ]
        self._unfinished = set(found)
        return found

    def on_checkpointed(self, num_recorded: int, num_bytes: int) -> None:
        """A checkpoint has recorded the first `num_recorded` of `since_checkpoint`, groups of `num_bytes` together, and
        the ledger has the states of the groups that the one before it recorded."""
        for one in self.checkpointed:
            self._taken_in.pop(one.ticket_id, None)
        self.checkpointed = self.since_checkpoint[:num_recorded]
        del self.since_checkpoint[:num_recorded]
        self._num_consumed = Counter(one.stream for one in (*self.since_checkpoint, *self.checkpointed))
        self.unsettled_bytes -= num_bytes
