"""Random agents: they append, fork, rewrite, repeat and ask in parallel, and send replies back in their own form."""

import json
import random
from typing import Any

from headrace.common.models.template_probe import TOOL, TOOL_NAME
from headrace.common.wire import Message, Ticket
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.errors import BadRequest
from headrace.generation.gateway.messages import to_message
from headrace.generation.gateway.rendering import Rendering
from headrace.generation.gateway.segments import EpisodeRecord, LimitReached, MustWait, PlannedTurn
from tests.support.episodes import FakeModel

Raw = dict[str, Any]


class RandomAgent:
    """`histories` are the conversations that it knows, as it would send them; `planned` every turn that was planned."""

    def __init__(self, ticket: Ticket, rendering: Rendering, model: FakeModel, seed: int) -> None:
        self.record = EpisodeRecord(ticket, rendering)
        self.model = model
        self.planned: list[PlannedTurn] = []
        self.histories: list[list[Raw]] = [[dict(message) for message in ticket.messages]]
        self._tools = list(ticket.tools)
        self._random = random.Random(seed)
        self._under_way: list[tuple[PlannedTurn, list[Raw]]] = []
        self._num_calls = 0

    def act(self) -> None:
        """One request, or the reply to one under way."""
        if self._under_way and self._random.random() < 0.6:
            self.answer(self._random.randrange(len(self._under_way)))
        else:
            self._ask()

    def answer(self, place: int) -> None:
        """Samples one of the turns under way, and remembers its reply."""
        turn, sent = self._under_way.pop(place)
        sampled = self.model.sample(turn.prompt_tokens, turn.max_new_tokens)
        reply = self._reply(sampled.completion.text, sampled.completion.finish_reason)
        self.record.record(turn, sampled, reply, 2.0)
        self.histories.append([*sent, self._sent_back(reply)])

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def _ask(self) -> None:
        sent = self._messages()
        if not sent:
            return
        tools = self._tools if self._random.random() < 0.9 else [] if self._tools else [TOOL]
        conversation = Conversation([to_message(message, place) for place, message in enumerate(sent)], tools)
        max_tokens = self._random.choice([None, None, None, 2, 100])
        try:
            turn = self.record.plan(conversation, max_tokens, 1.0)
        except (LimitReached, MustWait, BadRequest):
            return
        self.planned.append(turn)
        self._under_way.append((turn, sent))

    def _messages(self) -> list[Raw]:
        history = list(self._random.choice(self.histories[-3:]))
        choice = self._random.random()
        if choice < 0.1:
            return [{"role": "user", "content": f"Another matter {self._random.randrange(3)}"}]
        if choice < 0.2 and len(history) > 2:  # it goes back
            return history[: self._random.randrange(1, len(history))]
        if choice < 0.3 and history:  # it rewrites
            history.pop(self._random.randrange(len(history)))
        if choice < 0.35:  # it repeats
            return history
        return history + self._following(history)

    def _following(self, history: list[Raw]) -> list[Raw]:
        calls = history[-1].get("tool_calls") or [] if history else []
        texts = ("7", "", "<|im_end|>", " more\n")
        if calls:
            return [
                {"role": "tool", "tool_call_id": call["id"], "content": self._random.choice(texts)} for call in calls
            ]
        if history and history[-1]["role"] != "assistant":
            return []
        return [{"role": "user", "content": f"And {self._random.randrange(9)} + 6?{self._random.choice(texts)}"}]

    def _reply(self, text: str, finish_reason: str) -> Message:
        """What a parser makes of it, as far as it matters here: now and then a call, or reasoning."""
        reply: Message = {"role": "assistant", "content": text}
        if self._random.random() < 0.2:
            reply["reasoning_content"] = "Three and four."
        if self._tools and finish_reason == "stop" and self._random.random() < 0.6:
            self._num_calls += 1
            function = {"name": TOOL_NAME, "arguments": {"first": 3.0, "second": 4}}
            reply |= {"content": "", "tool_calls": [{"id": f"call{self._num_calls:05d}", "function": function}]}
        return reply

    def _sent_back(self, reply: Message) -> Raw:
        sent = dict(reply) | {"content": reply["content"].strip() or None}
        if self._random.random() < 0.7:
            sent.pop("reasoning_content", None)
        if "tool_calls" in sent:
            function = {"name": TOOL_NAME, "arguments": json.dumps({"second": 4, "first": 3})}
            sent["tool_calls"] = [{"id": call["id"], "function": function} for call in reply["tool_calls"]]
        return sent
