"""Tasks for tests of `headrace try`; the reference of a ticket says what its episode does."""

from collections.abc import Iterator
from typing import Any

from headrace.common.environments import Chat, schema
from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.wire import Ticket

QUESTION = {"role": "user", "content": "Begin."}


def look(place: str) -> str:
    """What is there."""
    return f"nothing in {place}"


class Chatty:
    def __init__(self, does: list[str], has_tools: bool = False) -> None:
        self._does = does
        self._tools = [schema(look)] if has_tools else []

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter([Prompt([QUESTION], {"does": one}, self._tools) for one in self._does])

    async def rollout(self, chat: Chat, ticket: Ticket) -> Outcome:
        does: str = ticket.reference["does"]
        reply = await chat.reply(*[does] * (does == "refused"))
        if does == "raises":
            raise RuntimeError(f"no board for {reply.text}")
        if does == "rewrites":
            chat.messages[:] = [QUESTION, {"role": "user", "content": "In short: nothing yet."}]
            reply = await chat.reply()
        if does == "tools":
            reply = await chat.reply(*await reply.run(look))
        while does == "goes on" and reply.text:
            reply = await chat.reply("Go on.")
        return Outcome(0.5, {"turns": len(chat.messages) / 2})


class Scored(Chatty):
    rollout: Any = None

    def reward(self, completion: str, ticket: Ticket) -> float:
        if ticket.reference["does"] == "raises":
            raise RuntimeError("no rubric")
        return float(len(completion))
