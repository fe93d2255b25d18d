"""Tickets from a task's prompts: rendered by the model's chat template, tokenized, numbered by the data cursor.

Ticket ids name the data: `epoch-place` for training, with `.n` behind it for the n-th replacement of a stale group,
and `eval-version-place` for evaluation. The same id is never issued twice, whatever restarts; and since a task gives
the same prompts for the same epoch, a ticket can be made again from its id alone.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from common.chat import Chat
from common.config import RunConfig
from common.ledger import TicketName, parse_name
from common.tasks import Prompt, Task
from common.wire import MIN_TEMPERATURE, Sampling, Ticket
from services.learner.store import Cursor, LearnerStore

GREEDY = MIN_TEMPERATURE
"""At this temperature the likeliest token is sampled, or any that is within about 1e-5 nats of it. SGLang's own greedy
mode would send the other completions of the batch through its top-k sampler."""


class TicketSource:
    """Raises `ValueError` if the task has no prompts or one of them leaves the model no room."""

    is_recording = False
    is_exhausted = False

    def __init__(
        self, config: RunConfig, task: Task, tokenizer: Any, stop_token_ids: list[int], cursor: Cursor
    ) -> None:
        self.task = task
        self.chat = Chat(tokenizer, config.model, config.task.system_prompt)
        self.stop_token_ids = stop_token_ids
        self.configure(config)
        self.cursor = cursor
        self._prompts = self._from(cursor)
        self._again: deque[Ticket] = deque()

    def configure(self, config: RunConfig) -> None:
        self.config = config
        self.sampling = Sampling(config.sampling.temperature, config.sampling.max_new_tokens, self.stop_token_ids)

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> list[str]:
        """Adds `count` tickets, those to be issued again first; returns their ids."""
        again = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        now = {"min_weight_version": version, "issued_step": step, "sampling": self.sampling}
        tickets = [msgspec.structs.replace(ticket, **now) for ticket in again]
        tickets += self.next_train(count - len(again), step, version)
        store.add_tickets(store.keys.tickets, tickets, self.cursor)
        return [ticket.id for ticket in tickets]

    def replace_stale(self, ticket: Ticket) -> None:
        """The same prompt once more, in place of a stale group; what replaced one already is not replaced again."""
        if ticket.reissues == 0:
            name = str(parse_name(ticket.id)._replace(reissue=1))
            self._again.append(
                msgspec.structs.replace(ticket, id=name, reissues=1, attempts=0, avoid=[], interruptions=0)
            )

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """Tickets that Redis has lost, or that were still to be issued."""
        self._again += self.rebuild(ticket_ids, 0, 0)

    def to_issue(self) -> list[str]:
        return [ticket.id for ticket in self._again]

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
        return self._train(prompt, TicketName("train", epoch, place), step, version)

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        """Training tickets from their ids. Raises `ValueError` naming one that the data do not have."""
        by_epoch: dict[int, list[TicketName]] = defaultdict(list)
        for ticket_id in ticket_ids:
            name = parse_name(ticket_id)
            if name.kind != "train":
                raise ValueError(f"ticket {ticket_id}: expected a training ticket; its evaluation is over")
            by_epoch[name.epoch].append(name)
        tickets = {}
        for epoch, names in by_epoch.items():
            last = max(name.place for name in names)
            wanted = {name.place for name in names}
            prompts = itertools.islice(self._from(Cursor(epoch, 0)), last + 1)
            found = {place: prompt for place, prompt in enumerate(prompts) if place in wanted}
            for name in names:
                if name.place not in found:
                    raise ValueError(f"ticket {name}: epoch {epoch} of the data has no such prompt")
                tickets[str(name)] = self._train(found[name.place], name, step, version)
        return [tickets[ticket_id] for ticket_id in ticket_ids]

    def evaluation(self, step: int, version: int) -> list[Ticket]:
        """The held-out prompts of the evaluation after `step`."""
        settings = self.config.evaluation
        prompts = self.task.prompts("held_out", seed=self.config.seed, epoch=0)
        tickets = [
            self._ticket(prompt, f"eval-{version}-{place}", "eval", settings.num_samples, step, version)
            for place, prompt in enumerate(itertools.islice(prompts, settings.num_prompts))
        ]
        if settings.temperature is not None:
            sampling = msgspec.structs.replace(self.sampling, temperature=max(settings.temperature, GREEDY))
            tickets = [msgspec.structs.replace(ticket, sampling=sampling) for ticket in tickets]
        if not tickets:
            raise ValueError(f"task {self.config.task.name!r} has no held-out prompts")
        return tickets

    def _from(self, cursor: Cursor) -> Iterator[Prompt]:
        prompts = self.task.prompts("train", seed=self.config.seed, epoch=cursor.epoch)
        return itertools.islice(prompts, cursor.place, None)

    def _train(self, prompt: Prompt, name: TicketName, step: int, version: int) -> Ticket:
        ticket = self._ticket(prompt, str(name), "train", self.config.actor.group_size, step, version)
        return msgspec.structs.replace(ticket, reissues=name.reissue)

    def _ticket(self, prompt: Prompt, name: str, kind: Any, count: int, step: int, version: int) -> Ticket:
        return self.chat.ticket(
            prompt,
            id=name,
            kind=kind,
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
