"""Tickets from a task's prompts: rendered by the model's chat template, tokenized, numbered by the data cursor.

Ticket ids name the data: `epoch-position` for training, with a suffix `.n` for the n-th replacement of a stale group,
and `eval-version-position` for evaluation. An id is never issued twice, across all restarts. A task gives the same
prompts for the same epoch, so a ticket can be rebuilt from its id alone. A position of the data that makes no ticket is
entered in the ledger: `dead`, with the reason, or `skipped` if the prompt is too long for the engine.
"""

import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from headrace.common.config import RunConfig
from headrace.common.environments.limits import episode_limits
from headrace.common.models.chat_template import ChatTemplate, PromptError
from headrace.common.models.context_length import fits_context
from headrace.common.tasks import BadRow, Prompt, Task, has_rollout
from headrace.common.wire import MIN_TEMPERATURE, Sampling, Ticket
from headrace.common.wire.ledger import TicketId, parse_ticket_id
from headrace.common.wire.structs import MAX_SEQUENCE_TOKENS
from headrace.learner.intake.data_fingerprint import Fingerprint
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, UnusablePrompt

GREEDY = MIN_TEMPERATURE
"""At this temperature the likeliest token is sampled, or one within about 1e-5 nats of it. SGLang's own greedy mode
would send the other completions of the batch through its top-k sampler."""
MAX_UNUSABLE = 256
"""Unusable positions in one call of `issue`; the next call continues after them."""
_log = logging.getLogger(__name__)


class PromptTooLong(ValueError):
    """The engine would refuse the prompt: with the longest completion it exceeds the context."""


class _NumberedPrompt(NamedTuple):
    name: TicketId
    prompt: Prompt | BadRow


class TicketSource:
    """Raises `ValueError` if the task has no prompts, or no prompt of a whole epoch makes a ticket."""

    is_recording = False
    is_exhausted = False

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        chat: ChatTemplate,
        stop_token_ids: list[int],
        cursor: Cursor,
        max_sequence_tokens: int = MAX_SEQUENCE_TOKENS,
        data: Fingerprint | None = None,
    ) -> None:
        """`max_sequence_tokens`: the longest prompt with its completion that the engine takes. `data`: the fingerprint
        of the data that `cursor` is a position in."""
        self.task = task
        self.chat = chat
        self.stop_token_ids = stop_token_ids
        self.max_sequence_tokens = max_sequence_tokens
        self.data = data
        self.configure(config)
        self.cursor = cursor
        self._prompts = self._prompts_from(cursor)
        self._to_reissue: deque[Ticket] = deque()
        self._unrecoverable: list[UnusablePrompt] = []
        """Tickets that were to be issued again and cannot be rebuilt."""
        self._has_issued = cursor.position > 0
        """A ticket of this epoch was issued, as far as is known."""

    def configure(self, config: RunConfig) -> None:
        self.config = config
        sampling = config.sampling
        self.sampling = Sampling(sampling.temperature, sampling.max_new_tokens, self.stop_token_ids, sampling.stop)
        self.limits = episode_limits(config, self.max_sequence_tokens) if has_rollout(self.task) else None

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> IssueResult:
        """Adds `count` tickets, those to be issued again first; fewer if many positions of the data are unusable."""
        again = [self._to_reissue.popleft() for _ in range(min(count, len(self._to_reissue)))]
        gone, self._unrecoverable = self._unrecoverable, []
        now = {"min_weight_version": version, "issued_step": step, "sampling": self.sampling, "limits": self.limits}
        tickets = [msgspec.structs.replace(ticket, **now) for ticket in again]
        new, unusable = self._draw(count - len(again), step, version)
        store.add_tickets(store.keys.tickets, [*tickets, *new], self.cursor, [*gone, *unusable])
        return IssueResult([ticket.id for ticket in (*tickets, *new)], [*gone, *unusable])

    def replace_stale(self, ticket: Ticket) -> None:
        """Issues the prompt of a stale group once more; a replacement is not replaced again."""
        if ticket.reissues == 0:
            name = str(parse_ticket_id(ticket.id)._replace(reissue=1))
            self._to_reissue.append(
                msgspec.structs.replace(ticket, id=name, reissues=1, attempts=0, avoid=[], interruptions=0)
            )

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """Issues tickets that Redis has lost, or that were still to be issued; those whose data are gone are dead."""
        for found in self._rebuild_all(ticket_ids, 0, 0).values():
            if isinstance(found, Ticket):
                self._to_reissue.append(found)
            else:
                self._unrecoverable.append(found)

    def ids_to_issue(self) -> list[str]:
        return [*(ticket.id for ticket in self._to_reissue), *(one.ticket_id for one in self._unrecoverable)]

    def next_tickets(self, count: int, step: int, version: int) -> list[Ticket]:
        """The next `count` tickets, fewer if many prompts are unusable; moves the cursor, across epochs."""
        return self._draw(count, step, version)[0]

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        """Training tickets from their ids. Raises `ValueError` naming one that the data do not have."""
        tickets = []
        for found in self._rebuild_all(ticket_ids, step, version).values():
            if not isinstance(found, Ticket):
                raise ValueError(f"ticket {found.ticket_id}: {found.reason}")
            tickets.append(found)
        return tickets

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]:
        """The tickets of the evaluation after `step`; held-out prompts that make no ticket are left out."""
        settings = self.config.evaluation
        prompts = self.task.prompts("held_out", seed=self.config.seed, epoch=0)
        sampling = self.sampling
        if settings.temperature is not None:
            sampling = msgspec.structs.replace(sampling, temperature=max(settings.temperature, GREEDY))
        tickets, problem = [], ""
        for position, prompt in enumerate(itertools.islice(prompts, settings.num_prompts)):
            name = f"eval-{version}-{position}"
            try:
                ticket = self._ticket(prompt, name, "eval", settings.completions_per_prompt, step, version)
            except (PromptError, PromptTooLong) as error:
                problem = f"; held-out prompt {position}: {error}"
                _log.warning("held-out prompt %d is left out: %s", position, error, extra={"ticket": name})
            else:
                tickets.append(msgspec.structs.replace(ticket, sampling=sampling))
        if not tickets:
            raise ValueError(f"task {self.config.task.name!r} has no held-out prompts{problem}")
        return tickets

    def _draw(self, count: int, step: int, version: int) -> tuple[list[Ticket], list[UnusablePrompt]]:
        tickets: list[Ticket] = []
        unusable: list[UnusablePrompt] = []
        while len(tickets) < count and len(unusable) < MAX_UNUSABLE:
            name, prompt = self._next(unusable)
            try:
                tickets.append(self._training_ticket(prompt, name, step, version))
                self._has_issued = True
            except PromptTooLong as error:
                unusable.append(UnusablePrompt(str(name), "skipped", str(error)))
            except PromptError as error:
                unusable.append(
                    UnusablePrompt(str(name), "dead", f"prompt {name.position} of epoch {name.data_epoch}: {error}")
                )
        return tickets, unusable

    def _next(self, unusable: Sequence[UnusablePrompt]) -> _NumberedPrompt:
        try:
            prompt = next(self._prompts, None)
        except Exception as error:
            where = f"prompt {self.cursor.position} of epoch {self.cursor.data_epoch}"
            raise ValueError(f"task {self.config.task.name!r}, {where}: {type(error).__name__}: {error}") from error
        if prompt is None:
            self._begin_next_epoch(unusable)
            return self._next(unusable)
        epoch, position = self.cursor
        self.cursor = Cursor(epoch, position + 1)
        return _NumberedPrompt(TicketId("train", epoch, position), prompt)

    def _begin_next_epoch(self, unusable: Sequence[UnusablePrompt]) -> None:
        """Raises `ValueError` if every epoch would be like the last one, without a ticket."""
        task, (epoch, position) = self.config.task.name, self.cursor
        if position == 0:
            raise ValueError(f"task {task!r} has no training prompts")
        if not self._has_issued:
            last = f"; the last: {unusable[-1].reason}" if unusable else ""
            raise ValueError(
                f"task {task!r}: none of the {position} training prompts of epoch {epoch} can be used{last}"
            )
        self.cursor = Cursor(epoch + 1, 0)
        self._has_issued = False
        self._prompts = self._prompts_from(self.cursor)

    def _rebuild_all(self, ticket_ids: Sequence[str], step: int, version: int) -> dict[str, Ticket | UnusablePrompt]:
        """Training tickets from their ids, or why there is none; in the order of `ticket_ids`."""
        by_epoch: dict[int, list[TicketId]] = defaultdict(list)
        for ticket_id in ticket_ids:
            name = parse_ticket_id(ticket_id)
            if name.kind != "train":
                raise ValueError(f"ticket {ticket_id}: expected a training ticket; its evaluation is over")
            by_epoch[name.data_epoch].append(name)
        tickets: dict[str, Ticket | UnusablePrompt] = {}
        for epoch, names in by_epoch.items():
            wanted = {name.position for name in names}
            prompts = itertools.islice(self._prompts_from(Cursor(epoch, 0)), max(wanted) + 1)
            found = {position: prompt for position, prompt in enumerate(prompts) if position in wanted}
            tickets |= {str(name): self._rebuild(name, found.get(name.position), step, version) for name in names}
        return {ticket_id: tickets[ticket_id] for ticket_id in ticket_ids}

    def _rebuild(
        self, name: TicketId, prompt: Prompt | BadRow | None, step: int, version: int
    ) -> Ticket | UnusablePrompt:
        problem = f"epoch {name.data_epoch} of the data has no such prompt"
        if self.data is not None and name.data_epoch < self.data.first_epoch:
            problem = (
                f"the data of epoch {name.data_epoch} are gone: the run has others since epoch {self.data.first_epoch}"
            )
        elif prompt is not None:
            try:
                return self._training_ticket(prompt, name, step, version)
            except (PromptError, PromptTooLong) as error:
                problem = str(error)
        return UnusablePrompt(str(name), "dead", problem)

    def _prompts_from(self, cursor: Cursor) -> Iterator[Prompt | BadRow]:
        prompts = self.task.prompts("train", seed=self.config.seed, epoch=cursor.data_epoch)
        return itertools.islice(prompts, cursor.position, None)

    def _training_ticket(self, prompt: Prompt | BadRow, name: TicketId, step: int, version: int) -> Ticket:
        ticket = self._ticket(prompt, str(name), "train", self.config.actor.group_size, step, version)
        return msgspec.structs.replace(ticket, reissues=name.reissue)

    def _ticket(self, prompt: Prompt | BadRow, name: str, kind: Any, count: int, step: int, version: int) -> Ticket:
        if isinstance(prompt, BadRow):
            raise PromptError(prompt.reason)
        ticket = self.chat.make_ticket(
            prompt,
            id=name,
            kind=kind,
            num_completions=count,
            sampling=self.sampling,
            min_weight_version=version,
            issued_step=step,
            limits=self.limits,
        )
        limit, longest, length = self.max_sequence_tokens, self.sampling.max_new_tokens, len(ticket.prompt_tokens)
        if self.limits is not None:
            limit, longest = self.limits.max_context_tokens, 1
        if not fits_context(length, longest, limit):
            raise PromptTooLong(f"{length} tokens and {longest} new ones do not fit the context of {limit}")
        return ticket
