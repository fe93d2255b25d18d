"""What the learner's store reads and writes: the data cursor, stream entries, settlements, the state of the queues."""

from typing import Literal, NamedTuple

from headrace.common.wire import TicketState
from headrace.common.wire.ledger import LedgerEntry


class Cursor(NamedTuple):
    """The next prompt to issue: its position in a pass over the data."""

    data_epoch: int
    position: int


class Entry(NamedTuple):
    """An entry of `groups` or `eval_groups` that was read and is not settled yet."""

    stream: str
    entry_id: str
    ticket_id: str
    """`?` if the entry does not name its ticket."""
    payload: bytes


class UnusablePrompt(NamedTuple):
    """A position of the data for which no ticket is issued."""

    ticket_id: str
    state: Literal["dead", "skipped"]
    reason: str


class QueueState(NamedTuple):
    """The queues at one instant."""

    open_tickets: int
    """Tickets that are not answered yet."""
    in_stream: int
    """Groups in the stream, consumed ones included."""
    ledger_entries: list[LedgerEntry | None]
    """For each ticket that was asked about; None if it was never issued."""


class Settlement(NamedTuple):
    """The final state of the ticket of a consumed group."""

    stream: str
    entry_id: str
    ticket_id: str
    state: TicketState
