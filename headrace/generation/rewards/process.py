"""The parent's side of a reward worker: has it score a group, and kills it if it does not answer in time."""

from collections.abc import Sequence

from headrace.generation.rewards.worker import CompletionScore, ScoreRequest
from headrace.generation.workers.process import WorkerError, WorkerProcess, encode_message

LATE_S = 5.0
"""A worker that meets the deadline itself, for an asynchronous reward, has so much longer to say so."""


class RewardError(WorkerError):
    """A group could not be scored; the text gives the reason."""

    def __init__(self, text: str, completions: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.completions = completions
        """The completions without a reward."""


class RewardWorker(WorkerProcess):
    async def score(self, request: ScoreRequest) -> list[CompletionScore]:
        """Returns one score for each completion, in their order. Raises `WorkerError` if the next score does not come
        within the request's deadline, or the worker must not be used any more."""
        scores: list[CompletionScore] = []
        payload = encode_message(request)
        async with self.killed_on_failure():
            await self.send(payload)
            while len(scores) < len(request.completions):
                scores.append(await self.receive(CompletionScore, request.deadline_s, LATE_S))
                if not scores[-1].is_usable:
                    raise WorkerError(scores[-1].problem)
        return sorted(scores, key=lambda score: score.index)
