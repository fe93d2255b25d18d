"""The books of consumed groups: what became of which, and what the next checkpoint must know of it.

A consumed group stays in Redis until the checkpoint after the one that recorded it: `since_checkpoint` holds what
the next one will record, `recorded` what the last one did. Not for use by two threads without a lock around it.
"""

from collections import Counter
from collections.abc import Sequence

from headrace.common.wire import Group, TicketState
from headrace.common.wire.ledger import parse_ticket_id
from headrace.learner.store.store import Entry, LearnerStore, Settlement


class SettlementLog:
    def __init__(self, checkpointed: list[Settlement]) -> None:
        """`recorded`: by the checkpoint that the learner was taken up from."""
        self.counts: Counter[str] = Counter()
        """Of the whole run: groups by state, generated tokens."""
        self.since_checkpoint: list[Settlement] = []
        self.checkpointed = checkpointed
        self.unsettled_bytes = 0
        """Of groups in Redis that only the next checkpoint will record."""
        self.discarded: Counter[str] = Counter()
        """Uniform and stale groups since the last batch."""
        self._unfinished: set[str] = set()
        self._num_consumed_in = Counter(one.stream for one in checkpointed)
        """By stream. Asked for at every turn of the intake, which must not count a batch of 64 replicas each time."""

    def resume_unsettled(self, store: LearnerStore, pending: Sequence[Entry]) -> list[Entry]:
        """What earlier lives have issued and the last checkpoint did not see the end of. Of the `pending` entries those
        that no checkpoint has recorded are returned: of what one has recorded a Redis that went back may lack some."""
        recorded = {(one.stream, one.entry_id) for one in self.checkpointed}
        kept = [(entry.stream, entry.entry_id) in recorded for entry in pending]
        self._num_consumed_in = Counter(entry.stream for entry, is_kept in zip(pending, kept, strict=True) if is_kept)
        names = {name for name in store.unfinished() if parse_ticket_id(name).kind == "train"}
        self._unfinished |= names - {one.ticket_id for one in self.checkpointed}
        return [entry for entry, is_kept in zip(pending, kept, strict=True) if not is_kept]

    def issued(self, ticket_ids: list[str]) -> None:
        self._unfinished |= set(ticket_ids)

    def consume(self, entry: Entry, group: Group, state: TicketState) -> None:
        self.since_checkpoint.append(Settlement(entry.stream, entry.entry_id, entry.ticket_id, state))
        self._unfinished.discard(entry.ticket_id)
        self._num_consumed_in[entry.stream] += 1
        self.unsettled_bytes += len(entry.payload)
        self.counts[state] += 1
        if state in ("uniform", "stale"):
            self.discarded[state] += 1
        self.counts["generated_tokens"] += group.num_trained_tokens

    def num_consumed_in(self, stream: str) -> int:
        """CheckpointDelta groups that still stand in the stream."""
        return self._num_consumed_in[stream]

    def unfinished(self, store: LearnerStore) -> list[str]:
        """Training tickets that are open or queued and not consumed."""
        names = sorted(self._unfinished)
        found = [
            name
            for name, mark in zip(names, store.marks(names), strict=True)
            if mark and mark.state in ("open", "queued")
        ]
        self._unfinished = set(found)
        return found

    def on_checkpointed(self, num_recorded: int, unsettled_bytes: int) -> None:
        """A checkpoint has recorded the first of `since_checkpoint`, of so many bytes."""
        self.checkpointed = self.since_checkpoint[:num_recorded]
        del self.since_checkpoint[:num_recorded]
        self._num_consumed_in = Counter(one.stream for one in (*self.since_checkpoint, *self.checkpointed))
        self.unsettled_bytes -= unsettled_bytes
