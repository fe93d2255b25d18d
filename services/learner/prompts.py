"""Tickets from a task's prompts: rendered by the model's chat template, tokenized, numbered by the data cursor.

Ticket ids name the data: `epoch-place` for training, with `.n` behind it for the n-th replacement of a stale group,
and `eval-version-place` for evaluation. The same id is never issued twice, whatever restarts.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec

from common.config import RunConfig
from common.tasks import Prompt, Task
from common.wire import Sampling, Ticket
from services.learner.store import Cursor


class TicketSource:
    """Raises `ValueError` if the task has no prompts or one of them leaves the model no room."""

    def __init__(
        self, config: RunConfig, task: Task, tokenizer: Any, stop_token_ids: list[int], cursor: Cursor
    ) -> None:
        self.config = config
        self.task = task
        self.tokenizer = tokenizer
        self.sampling = Sampling(config.sampling.temperature, config.sampling.max_new_tokens, stop_token_ids)
        self.cursor = cursor
        self._prompts = self._from(cursor)

    def next_train(self, count: int, step: int, version: int) -> list[Ticket]:
        """The next `count` prompts; moves the cursor, across epochs."""
        return [self._next(step, version) for _ in range(count)]

    def _next(self, step: int, version: int) -> Ticket:
        prompt = next(self._prompts, None)
        if prompt is None:
            if self.cursor.place == 0:
                raise ValueError(f"task {self.config.task.name!r} has no training prompts")
            self.cursor = Cursor(self.cursor.epoch + 1, 0)
            self._prompts = self._from(self.cursor)
            return self._next(step, version)
        epoch, place = self.cursor
        self.cursor = Cursor(epoch, place + 1)
        return self._ticket(prompt, f"{epoch}-{place}", "train", self.config.actor.group_size, step, version)

    def reissue(self, ticket: Ticket, step: int, version: int) -> Ticket:
        """The same prompt once more, in place of a stale group."""
        number = ticket.reissues + 1
        return msgspec.structs.replace(
            ticket,
            id=f"{ticket.id.partition('.')[0]}.{number}",
            reissues=number,
            min_weight_version=version,
            issued_step=step,
            attempts=0,
            avoid=[],
        )

    def evaluation(self, step: int, version: int) -> list[Ticket]:
        """The held-out prompts of the evaluation after `step`."""
        settings = self.config.evaluation
        prompts = self.task.prompts("held_out", seed=self.config.seed, epoch=0)
        tickets = [
            self._ticket(prompt, f"eval-{version}-{place}", "eval", settings.num_samples, step, version)
            for place, prompt in enumerate(itertools.islice(prompts, settings.num_prompts))
        ]
        if not tickets:
            raise ValueError(f"task {self.config.task.name!r} has no held-out prompts")
        return tickets

    def _from(self, cursor: Cursor) -> Iterator[Prompt]:
        prompts = self.task.prompts("train", seed=self.config.seed, epoch=cursor.epoch)
        return itertools.islice(prompts, cursor.place, None)

    def _ticket(self, prompt: Prompt, name: str, kind: Any, count: int, step: int, version: int) -> Ticket:
        text = self.tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        return Ticket(
            id=name,
            kind=kind,
            prompt_tokens=self.tokenizer.encode(text, add_special_tokens=False),
            messages=prompt.messages,
            reference=prompt.reference,
            num_completions=count,
            sampling=self.sampling,
            min_weight_version=version,
            issued_step=step,
        )


def stop_token_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """The model's end tokens: its generation config's, else its tokenizer's."""
    given = getattr(generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    if given is None:
        raise ValueError("neither the generation config nor the tokenizer names an end token")
    return sorted(given) if isinstance(given, list) else [given]
