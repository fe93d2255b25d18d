"""An episode whose requests are passed on to a model behind an endpoint: conversations, and no tokens."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec

from headrace.common.wire import FinishReason, Rollout, Ticket
from headrace.common.wire.trial_report import ReplyReport, SegmentReport
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.gateway.answering import AnsweredEpisode
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.messages import is_prefix, to_message
from headrace.generation.gateway.replies import ChatReply
from headrace.generation.gateway.request import ChatRequest
from headrace.generation.gateway.segments import EpisodeOver, LimitName, LimitReached
from headrace.generation.trial.remote import RemoteModel

Constrained = Literal["refuse", "ignore"]


class RelayedRecord:
    """Conversations, and no tokens; the limits of turns and of sampled tokens hold, the latter as far as the endpoint
    counts them."""

    def __init__(self, ticket: Ticket) -> None:
        assert ticket.limits is not None, "an episode has limits"
        self.num_turns = 0
        self.text = ""
        self.unconfirmed: list[SampledTurn] = []
        self.is_sealed = False
        self._limits = ticket.limits
        self._num_tokens = 0
        self._finish_reason: FinishReason = "stop"
        self._conversations: list[tuple[Conversation, list[ReplyReport]]] = []
        """Up to the last reply, with all replies."""

    def room(self, max_tokens: int) -> int:
        """How many tokens the next reply may have, at most `max_tokens`. Raises `LimitReached` or `EpisodeOver`."""
        if self.is_sealed:
            raise EpisodeOver
        left = self._limits.max_tokens - self._num_tokens
        reached: LimitName | None = "max_turns" if self.num_turns >= self._limits.max_turns else None
        reached = reached or ("max_tokens" if left <= 0 else None)
        if reached is not None:
            self._finish_reason = reached
            raise LimitReached(reached)
        return min(max_tokens, left)

    def add(self, conversation: Conversation, reply: ChatReply, seconds: float) -> None:
        if self.is_sealed:
            raise EpisodeOver
        whole = Conversation([*conversation.messages, to_message(reply.message, 0)], conversation.tools)
        before = [one for one in self._conversations if is_prefix(one[0].forms, conversation.forms)]
        replies = before[-1][1] if before else []
        replies.append(ReplyReport(seconds))
        self._conversations = [one for one in self._conversations if one[1] is not replies] + [(whole, replies)]
        self.num_turns += 1
        self._num_tokens += reply.usage.get("completion_tokens") or 0
        self._finish_reason = "length" if reply.finish_reason == "length" else "stop"
        self.text = reply.message["content"]

    def rollout(
        self, reward: float, metrics: Mapping[str, float], prompts: GroupPrompts, failed_episodes: int = 0
    ) -> Rollout:
        """Without segments: it cannot be trained on."""
        return Rollout([], reward, self._finish_reason, self.text, metrics=dict(metrics))

    def segment_reports(self) -> list[SegmentReport]:
        return [SegmentReport(conversation.messages, replies) for conversation, replies in self._conversations]


class RelayedEpisode(AnsweredEpisode):
    """An episode whose replies the remote model gives."""

    def __init__(
        self, ticket: Ticket, base_url: str, api_key: str, remote: RemoteModel, constrained: Constrained
    ) -> None:
        super().__init__(base_url, api_key, remote.name, constrained, Counter(), executor=None)
        self.record = RelayedRecord(ticket)
        self._remote = remote
        self._sampling = ticket.sampling

    async def _seal(self) -> None:
        self.record.is_sealed = True

    async def _reply(self, request: ChatRequest) -> ChatReply:
        wanted = min(request.max_tokens or self._sampling.max_new_tokens, self._sampling.max_new_tokens)
        stop = [*self._sampling.stop, *request.stop]
        sampling = msgspec.structs.replace(self._sampling, max_new_tokens=self.record.room(wanted), stop=stop)
        began_s = time.monotonic()
        conversation = request.conversation
        tools = conversation.tools if request.parses_calls else []
        reply = await self._remote.reply(conversation.messages, tools, sampling)
        self.record.add(conversation, reply, time.monotonic() - began_s)
        return reply
