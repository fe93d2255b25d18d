"""The source of a learner's groups: tickets that replicas answer (ticket_source.py), or a recording
(recording_source.py)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket
from headrace.learner.intake.data_fingerprint import Fingerprint
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, UnusablePrompt


class IssueResult(NamedTuple):
    """What a call of `issue` has added to Redis."""

    ticket_ids: list[str]
    unusable: list[UnusablePrompt] = []
    """Positions of the data for which there is no ticket."""


class GroupSource(Protocol):
    cursor: Cursor
    is_recording: bool

    @property
    def is_exhausted(self) -> bool:
        """Nothing is left to issue; true of recordings only."""
        ...

    def configure(self, config: RunConfig) -> None:
        """Tickets issued from now on are sampled as `config` says."""
        ...

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> IssueResult:
        """Adds up to `count` tickets (or recorded groups) to Redis."""
        ...

    def replace_stale(self, ticket: Ticket) -> None:
        """Issues the prompt of a stale group once more."""
        ...

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """Issues training tickets that Redis has lost, or that were still to be issued."""
        ...

    def ids_to_issue(self) -> list[str]:
        """The tickets that are still to be issued again, for the checkpoint."""
        ...

    @property
    def data(self) -> Fingerprint | None:
        """The fingerprint of the data, for the checkpoint; None for a recording."""
        ...

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        """Training tickets from their ids. Raises `ValueError` naming one that cannot be rebuilt."""
        ...

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]: ...
