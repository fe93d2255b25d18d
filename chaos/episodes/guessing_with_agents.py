"""The guessing game, in which an agent asks for the replies of every fourth episode.

The metrics of an episode say what it saw, so that a group's tokens can be held against it: `episode`, a random number
that names it; `replies`, how many there were, and `digest`, a checksum of their texts; `is_agent`.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import msgspec

from headrace.common.environments import Chat, Reply
from headrace.common.tasks import Outcome
from headrace.common.tasks.guessing import Guessing
from headrace.common.wire import Message, Ticket

AGENT = Path(__file__).with_name("agent.py")
AGENT_EVERY = 4
Ask = Callable[..., Awaitable[Reply]]


class GuessingWithAgents(Guessing):
    async def rollout(self, chat: Chat, ticket: Ticket) -> Outcome:
        is_agent = chat.seed % AGENT_EVERY == 0
        async with agent_of(chat) if is_agent else contextlib.nullcontext(chat.reply) as ask:
            seen: Any = Seen(ask)
            outcome = await super().rollout(seen, ticket)
        names = {"episode": float(random.SystemRandom().getrandbits(52)), "is_agent": float(is_agent)}
        seen_metrics = {"replies": float(len(seen.texts)), "digest": digest(seen.texts)}
        return msgspec.structs.replace(outcome, metrics={**outcome.metrics, **names, **seen_metrics})


class Seen:
    """In place of a `Chat`: remembers the texts of the replies."""

    def __init__(self, ask: Ask) -> None:
        self.texts: list[str] = []
        self._ask = ask

    async def reply(self, *messages: Message | str) -> Reply:
        reply = await self._ask(*messages)
        if reply.finish_reason in ("stop", "length"):
            self.texts.append(reply.text)
        return reply


def digest(texts: Sequence[str]) -> float:
    return float(zlib.crc32(json.dumps(list(texts)).encode()))


@contextlib.asynccontextmanager
async def agent_of(chat: Chat) -> AsyncIterator[Ask]:
    """Starts an agent for the conversation; it has ended when the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(AGENT), stdin=PIPE, stdout=PIPE, env={**os.environ, **chat.environ}
    )
    assert process.stdin is not None and process.stdout is not None
    opening, stdin, stdout = list(chat.messages), process.stdin, process.stdout

    async def ask(*texts: str) -> Reply:
        stdin.write(json.dumps([*opening, *({"role": "user", "content": text} for text in texts)]).encode() + b"\n")
        opening.clear()
        line = await stdout.readline()
        if not line:
            raise RuntimeError(f"the agent ended with {await process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return Reply(answer.get("text", ""), finish_reason=answer.get("limit", "stop"))

    try:
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
