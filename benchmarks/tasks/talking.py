"""Environments that cost next to nothing: what is left is the cost of turns and of episodes themselves."""

import asyncio
from collections.abc import Iterator

from headrace.common.environments import Chat
from headrace.common.tasks import Prompt, Split
from headrace.common.wire import Ticket

MESSAGE = {"role": "user", "content": "Go on."}


class Talking:
    """Asks for as many replies as the ticket's reference says."""

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        raise NotImplementedError("the benchmark makes its own tickets")

    async def rollout(self, chat: Chat, ticket: Ticket) -> float:
        await chat.reply()
        for _ in range(ticket.reference["turns"] - 1):
            await chat.reply(MESSAGE)
        return 1.0


class Sleeping(Talking):
    """Asks for nothing for the seconds of the ticket's reference."""

    async def rollout(self, chat: Chat, ticket: Ticket) -> float:
        await asyncio.sleep(ticket.reference["seconds"])
        return 1.0
