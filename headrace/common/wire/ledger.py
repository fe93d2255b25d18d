"""The ledger: a hash in Redis with one entry for every ticket that the run has ever issued.

A ledger entry is the ticket's state and, while a stream holds the ticket or its group, the id of that stream entry:
`open 17-0` (in `tickets` or `eval_tickets`), `answered 18-0` (in `groups` or `eval_groups`), `dead 19-0` (in
`dead_letters`; `dead` alone once purged), else `trained`, `uniform`, `stale` or `evaluated`; or `skipped`, where a
prompt was too long to be issued.
A stream entry to which no ledger entry points is never acted on.
"""

import re
from typing import NamedTuple

from headrace.common.wire import TicketState


class LedgerEntry(NamedTuple):
    state: TicketState
    entry_id: str = ""

    def __str__(self) -> str:
        return f"{self.state} {self.entry_id}".rstrip()


def parse_ledger_entry(text: bytes) -> LedgerEntry:
    state, _, entry_id = text.decode().partition(" ")
    return LedgerEntry(state, entry_id)  # type: ignore[arg-type]


class TicketId(NamedTuple):
    """A ticket's id: `data_epoch-position`, `data_epoch-position.reissue`, or `eval-version-position`."""

    kind: str
    data_epoch: int
    """The pass over the data; of an evaluation ticket, the weight version."""
    position: int
    """The prompt's index in that pass, or among the held-out prompts."""
    reissue: int = 0
    """How many tickets for this prompt came before: their groups became stale."""

    def __str__(self) -> str:
        if self.kind == "eval":
            return f"eval-{self.data_epoch}-{self.position}"
        return f"{self.data_epoch}-{self.position}" + (f".{self.reissue}" if self.reissue else "")


def parse_ticket_id(ticket_id: str) -> TicketId:
    """Raises `ValueError` if `ticket_id` does not have the form of a ticket id."""
    found = re.fullmatch(r"(eval-)?(\d{1,18})-(\d{1,18})(?:\.(\d{1,9}))?", ticket_id)
    if found is None or (found[1] and found[4]):
        raise ValueError(f"ticket {ticket_id!r}: expected epoch-position, epoch-position.n or eval-version-position")
    return TicketId("eval" if found[1] else "train", int(found[2]), int(found[3]), int(found[4] or 0))
