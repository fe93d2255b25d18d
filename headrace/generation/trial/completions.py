"""One completion for each ticket of a task with `reward`, and its score."""

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from headrace.common.wire import FinishReason, Message, Ticket
from headrace.common.wire.trial_report import ReplyReport, RolloutReport, SegmentReport
from headrace.generation.engine.client import Engine, EngineError
from headrace.generation.gateway.errors import GatewayError
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.rewards.process import RewardError
from headrace.generation.trial.remote import RemoteModel


class SampledText(NamedTuple):
    text: str
    finish_reason: FinishReason
    num_tokens: int | None = None


class EngineCompletions:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def sample(self, ticket: Ticket) -> SampledText:
        (completion,) = await self._engine.generate(ticket)
        return SampledText(completion.text, completion.finish_reason, len(completion.tokens))


class RemoteCompletions:
    def __init__(self, remote: RemoteModel) -> None:
        self._remote = remote

    async def sample(self, ticket: Ticket) -> SampledText:
        reply = await self._remote.reply(ticket.messages, [], ticket.sampling)
        return SampledText(reply.message["content"], "length" if reply.finish_reason == "length" else "stop")


class PlayedCompletions:
    def __init__(self, sample: Callable[[Ticket], Awaitable[SampledText]], rewards: RewardPool) -> None:
        self._sample = sample
        self._rewards = rewards

    async def play(self, ticket: Ticket) -> RolloutReport:
        """Of a ticket that asks for one rollout."""
        began_s = time.monotonic()
        try:
            sampled = await self._sample(ticket)
        except (EngineError, GatewayError) as error:
            return RolloutReport(ticket.id, [], time.monotonic() - began_s, problem=str(error))
        reply = ReplyReport(time.monotonic() - began_s, sampled.num_tokens)
        messages: list[Message] = [*ticket.messages, {"role": "assistant", "content": sampled.text}]
        num_prompt_tokens = len(ticket.prompt_tokens) if sampled.num_tokens is not None else 0
        segments = [SegmentReport(messages, [reply], num_prompt_tokens=num_prompt_tokens)]
        try:
            (outcome,) = await self._rewards.score(ticket, [sampled.text])
        except RewardError as error:
            problem = str(error).removeprefix(f"ticket {ticket.id}: completion 1 of 1: ")
            return RolloutReport(ticket.id, segments, time.monotonic() - began_s, problem=problem)
        seconds = time.monotonic() - began_s
        return RolloutReport(
            ticket.id, segments, seconds, sampled.finish_reason, outcome.reward, metrics=outcome.metrics
        )
