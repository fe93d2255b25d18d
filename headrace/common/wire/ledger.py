"""The ledger: what the run's hash says of every ticket it ever issued.

A mark is the ticket's state and, while something of it stands in a stream, the id of that entry: `open 17-0` (in
`tickets` or `eval`), `queued 18-0` (in `groups` or `evaluated`), `dead 19-0` (in `dead`; `dead` alone once purged),
else `trained`, `uniform`, `stale` or `evaluated`; or `skipped`, where a prompt was too long to be issued. An entry that
no mark points to is nobody's: it is never acted on.
"""

import re
from typing import NamedTuple

from headrace.common.wire import TicketState


class Mark(NamedTuple):
    state: TicketState
    entry_id: str = ""

    def __str__(self) -> str:
        return f"{self.state} {self.entry_id}".rstrip()


def parse_mark(mark: bytes) -> Mark:
    state, _, entry_id = mark.decode().partition(" ")
    return Mark(state, entry_id)  # type: ignore[arg-type]


class TicketName(NamedTuple):
    """What a ticket's id says: `epoch-place`, `epoch-place.reissue`, or `eval-version-place`."""

    kind: str
    epoch: int
    """Of an evaluation ticket: the weight version."""
    place: int
    reissue: int = 0

    def __str__(self) -> str:
        if self.kind == "eval":
            return f"eval-{self.epoch}-{self.place}"
        return f"{self.epoch}-{self.place}" + (f".{self.reissue}" if self.reissue else "")


def parse_name(ticket_id: str) -> TicketName:
    """Raises `ValueError` if no ticket is called so."""
    found = re.fullmatch(r"(eval-)?(\d{1,18})-(\d{1,18})(?:\.(\d{1,9}))?", ticket_id)
    if found is None or (found[1] and found[4]):
        raise ValueError(f"ticket {ticket_id!r}: expected epoch-place, epoch-place.n or eval-version-place")
    return TicketName("eval" if found[1] else "train", int(found[2]), int(found[3]), int(found[4] or 0))
