"""A recording as a learner's source of groups, in place of tickets and replicas."""

from collections.abc import Sequence

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.intake.recordings import Recording
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor


class RecordingSource:
    """Its cursor is an index into the recording."""

    is_recording = True
    data = None

    def __init__(self, recording: Recording, cursor: Cursor) -> None:
        self.recording = recording
        self.cursor = cursor
        self.is_exhausted = False
        self._again: list[int] = []

    def configure(self, config: RunConfig) -> None:
        """Does nothing: the groups were sampled already."""

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> IssueResult:
        again, self._again = self._again[:count], self._again[count:]
        last = min(self.cursor.position + count - len(again), self.recording.num_groups)
        groups = self.recording.groups([*again, *range(self.cursor.position, last)])
        self.is_exhausted = not groups
        if groups:
            self.cursor = Cursor(0, last)
            store.add_groups(groups, self.cursor)
        return IssueResult([ticket_id for ticket_id, _ in groups])

    def replace_stale(self, ticket: Ticket) -> None:
        """Does nothing: if the recorded run issued a replacement, it comes later in the recording."""

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """Adds groups that Redis has lost once more."""
        wanted = set(ticket_ids)
        names = self.recording.groups(range(self.recording.num_groups)) if wanted else []
        self._again = [index for index, (ticket_id, _) in enumerate(names) if ticket_id in wanted]

    def ids_to_issue(self) -> list[str]:
        return []

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        raise ValueError(f"tickets {', '.join(ticket_ids)}: a recording issues none")

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]:
        raise AssertionError("a recording is not evaluated")
