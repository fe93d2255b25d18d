"""The messages between an environment worker and its parent, after `Setup` and its reply."""

import msgspec

from headrace.common.tasks import Outcome
from headrace.common.wire import Ticket


class EpisodeStart(msgspec.Struct, frozen=True, tag=True):
    """Starts `rollout` once."""

    ticket: Ticket
    place: int
    """Of the episode in its group."""
    attempt: int
    """How often it was begun before."""
    seed: int
    base_url: str
    api_key: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.ticket.id}-{self.place}-{self.attempt}"


class Begin(msgspec.Struct, frozen=True, tag=True):
    id: int
    """Of the episode in this worker's messages."""
    episode: EpisodeStart


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Ends an episode, whose outcome nobody wants any more."""

    id: int


class Cancelling(msgspec.Struct, frozen=True, tag=True):
    """The reply to `Cancel`, at once: the worker's event loop runs. `Ended` follows when the episode has ended."""

    id: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """`rollout` has returned or raised."""

    id: int
    outcome: Outcome | None = None
    """None if it failed, for the reason in `problem`."""
    problem: str = ""


ToWorker = Begin | Cancel
FromWorker = Cancelling | Ended
