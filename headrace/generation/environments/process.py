"""The parent's side of an environment worker: begins episodes in it, ends those that are overdue, and says whose fault
it is when the worker has to be killed or dies.

An episode that is cancelled and not gone after `CANCEL_S` costs the worker. If the worker's event loop still runs, that
episode has failed, and the others are interrupted. If it does not, or the process has died, any of them may be the
cause: all are interrupted, to be begun again each in a worker of its own, and one that was alone has failed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.common.tasks import Outcome
from headrace.generation.environments.deadlines import EpisodeDeadlines
from headrace.generation.environments.messages import Begin, Cancel, Cancelling, Ended, EpisodeStart, FromWorker
from headrace.generation.workers.process import WorkerError, WorkerProcess, encode_message

CANCEL_S = 5.0
LEAVE_S = 2.0
"""Given to the episodes and the task's context manager to end when the pool is closed."""


class EpisodeFailed(Exception):
    """The episode failed by itself; the text, one line, says why."""


class EpisodeInterrupted(Exception):
    """The episode was ended by something else. It is to be begun again, which is nobody's failure."""

    def __init__(self, reason: str, is_suspect: bool = False) -> None:
        super().__init__(reason)
        self.is_suspect = is_suspect
        """It may be what ended its worker: it is to be begun again in a worker of its own."""


@dataclass
class _Playing:
    on_gone: Callable[[], None]
    result: asyncio.Future[Outcome | Exception] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    is_acknowledged: bool = False
    """The worker has read that the episode is cancelled."""


class EnvironmentWorker(WorkerProcess):
    """Plays episodes. `watch` is called once it is set up."""

    def __init__(self, *connection: Any) -> None:
        super().__init__(*connection)
        self._playing: dict[int, _Playing] = {}
        self._num_begun = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        self._watching = asyncio.create_task(self._watch(), name="environment worker")

    async def close(self) -> None:
        """Ends the worker and all that it plays, which is interrupted."""
        self._end_all(lambda: EpisodeInterrupted("the replica ends"))
        if self._watching is not None:
            self._requests.write_eof()
            await asyncio.wait([self._watching], timeout=LEAVE_S)
        self.kill()
        await self.wait()
        await asyncio.gather(*self._tasks, *([self._watching] if self._watching else []))

    async def play(self, episode: EpisodeStart, deadlines: EpisodeDeadlines, on_gone: Callable[[], None]) -> Outcome:
        """Calls `on_gone` when the episode runs no more, which may be after the call was cancelled. Raises
        `EpisodeFailed` or `EpisodeInterrupted`."""
        self._num_begun += 1
        number = self._num_begun
        playing = self._playing[number] = _Playing(on_gone)
        try:
            self._requests.write(encode_message(Begin(number, episode)))
            while not (problem := deadlines.problem()):
                await asyncio.wait([playing.result], timeout=deadlines.left_s())
                if playing.result.done():
                    return _outcome(playing.result.result())
            await self._end(number, playing)
        except asyncio.CancelledError:
            self._end_later(number, playing)
            raise
        except WorkerError as error:  # a text of the ticket cannot be encoded
            self._gone(number, EpisodeFailed(str(error)))
            raise EpisodeFailed(str(error)) from error
        result = playing.result.result()
        raise result if isinstance(result, EpisodeInterrupted) else EpisodeFailed(problem)

    def _end_later(self, number: int, playing: _Playing) -> None:
        task = asyncio.create_task(self._end(number, playing), name="ending an episode")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, number: int, playing: _Playing) -> None:
        """Returns when the episode is gone, and has a result."""
        if not playing.result.done():
            self._requests.write(encode_message(Cancel(number)))
            await asyncio.wait([playing.result], timeout=CANCEL_S)
        if playing.result.done():
            return
        if not playing.is_acknowledged:
            self._end_suspects(f"its worker's event loop was blocked for {CANCEL_S:g} s")
            return
        self.kill()
        self._gone(number, EpisodeFailed(f"it was cancelled and did not end within {CANCEL_S:g} s"))
        self._end_all(lambda: EpisodeInterrupted("another episode in its worker did not end"))

    async def _watch(self) -> None:
        message_type: Any = FromWorker
        try:
            while True:
                message = await self.receive(message_type)
                playing = self._playing.get(message.id)
                if isinstance(message, Cancelling) and playing is not None:
                    playing.is_acknowledged = True
                elif isinstance(message, Ended):
                    self._gone(message.id, message.outcome or EpisodeFailed(message.problem))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.kill()
            reason = f"its worker's process ended with status {await self.wait()}"
        except (msgspec.DecodeError, WorkerError) as error:
            reason = f"its worker sent what is no message: {error}"
        self._end_suspects(reason)

    def _end_suspects(self, reason: str) -> None:
        """Kills a worker that any of its episodes may have made useless."""
        self.kill()
        is_alone = len(self._playing) == 1
        self._end_all(lambda: EpisodeFailed(reason) if is_alone else EpisodeInterrupted(reason, is_suspect=True))

    def _end_all(self, result: Callable[[], Exception]) -> None:
        for number in list(self._playing):
            self._gone(number, result())

    def _gone(self, number: int, result: Outcome | Exception) -> None:
        playing = self._playing.pop(number, None)
        if playing is not None:
            playing.result.set_result(result)
            playing.on_gone()


def _outcome(result: Outcome | Exception) -> Outcome:
    if isinstance(result, Exception):
        raise result
    return result
