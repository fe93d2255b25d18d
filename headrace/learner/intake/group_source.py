"""Where a learner's groups come from: tickets that replicas answer (ticket_source.py), or a recording
(recordings.py)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket
from headrace.learner.intake.data_fingerprint import Fingerprint
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, UnusablePrompt


class IssueResult(NamedTuple):
    """What one call has put into Redis."""

    ticket_ids: list[str]
    unusable: list[UnusablePrompt] = []
    """Places of the data of which there is no ticket."""


class GroupSource(Protocol):
    cursor: Cursor
    is_recording: bool

    @property
    def is_exhausted(self) -> bool:
        """Only a recording ends."""
        ...

    def configure(self, config: RunConfig) -> None:
        """What is issued from now on is sampled as `config` says."""
        ...

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> IssueResult:
        """Adds up to `count` tickets (or recorded groups) to Redis."""
        ...

    def replace_stale(self, ticket: Ticket) -> None: ...

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """What Redis has lost, or what was still to be issued."""
        ...

    def ids_to_issue(self) -> list[str]:
        """What a checkpoint must remember to issue again."""
        ...

    @property
    def data(self) -> Fingerprint | None:
        """What a checkpoint must say of the data; None of a recording."""
        ...

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        """Training tickets from their ids. Raises `ValueError` naming one that cannot be."""
        ...

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]: ...
