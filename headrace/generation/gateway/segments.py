"""Which recorded tokens a request of an episode continues, and what is recorded of its reply. Pure.

An episode is a list of segments. A request whose messages begin with all of a segment's goes on behind that segment's
tokens, which are never encoded again; any other request begins a new segment. So every sampled token stands in exactly
one segment, behind exactly the tokens that it was sampled behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.common.wire import FinishReason, Message, Rollout, SegmentOrigin, Ticket
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.errors import BadRequest
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.messages import to_message
from headrace.generation.gateway.recorded_segment import RecordedSegment
from headrace.generation.gateway.rendering import Rendering

LimitName = Literal["max_turns", "max_tokens", "max_segments", "context"]


class LimitReached(Exception):
    """A limit of the episode leaves no reply to this request."""

    def __init__(self, name: LimitName) -> None:
        super().__init__(name)
        self.name = name


class MustWait(Exception):
    """Turns under way may use up the tokens that this one asks for: plan it again when one of them has ended."""


class EpisodeOver(Exception):
    """The episode's record is sealed."""


@dataclass(frozen=True, eq=False)
class PlannedTurn:
    """A reply to be sampled behind exactly `prompt_tokens`."""

    conversation: Conversation
    prompt_tokens: list[int]
    max_new_tokens: int
    segment: RecordedSegment
    """Without a reply yet if the turn begins it."""
    bridge: list[int]
    """The tokens of the prompt that the segment does not have yet."""
    began_s: float


class EpisodeRecord:
    """Of one episode of a ticket with limits. `plan` comes before each reply, then `record` or `abandon`."""

    def __init__(self, ticket: Ticket, rendering: Rendering) -> None:
        assert ticket.limits is not None, "an episode has limits"
        self.num_turns = 0
        self.text = ""
        """Of the last reply."""
        self.unconfirmed: list[SampledTurn] = []
        """Turns whose versions the engine was still confirming."""
        self._ticket = ticket
        self._limits = ticket.limits
        self._rendering = rendering
        self._question = _question(ticket)
        self._segments: list[RecordedSegment] = []
        self._under_way: set[PlannedTurn] = set()
        self._num_sampled = 0
        self._finish_reason: FinishReason = "stop"
        self._is_sealed = False

    def plan(self, conversation: Conversation, max_tokens: int | None, now_s: float) -> PlannedTurn:
        """The turn that answers the request, with at most `max_tokens` tokens.

        Raises `LimitReached`, `MustWait`, `EpisodeOver`, or `BadRequest` if the template refuses the messages.
        """
        self._expect_open()
        left = self._limits.max_tokens - self._num_sampled
        self._expect(self.num_turns + len(self._under_way) < self._limits.max_turns, "max_turns")
        self._expect(left > 0, "max_tokens")
        segment, bridge = self._segment_for(conversation)
        num_begun = len(self._segments) + sum(not turn.segment.num_sampled for turn in self._under_way)
        self._expect(segment.num_sampled > 0 or num_begun < self._limits.max_segments, "max_segments")
        prompt = [*segment.prompt, *segment.tokens, *bridge]
        room = self._limits.max_context_tokens - len(prompt)
        self._expect(room > 0, "context")
        wanted = min(max_tokens or room, room, self._ticket.sampling.max_new_tokens, left)
        if wanted > left - sum(turn.max_new_tokens for turn in self._under_way):
            raise MustWait
        turn = PlannedTurn(conversation, prompt, wanted, segment, bridge, now_s)
        segment.is_being_extended = True
        self._under_way.add(turn)
        return turn

    def record(self, turn: PlannedTurn, sampled: SampledTurn, reply: Message, now_s: float) -> None:
        """The turn's reply, and the message that the client is sent. Raises `EpisodeOver`."""
        self._expect_open()
        self.abandon(turn)
        if not turn.segment.num_sampled:
            self._segments.append(turn.segment)
        turn.segment.append(turn.conversation, turn.bridge, sampled, reply, (turn.began_s, now_s))
        self.num_turns += 1
        self._num_sampled += len(sampled.completion.tokens)
        self._finish_reason = sampled.completion.finish_reason
        self.text = sampled.completion.text
        if sampled.unconfirmed is not None:
            self.unconfirmed.append(sampled)

    def abandon(self, turn: PlannedTurn) -> None:
        """The turn has no reply, and never will."""
        self._under_way.discard(turn)
        turn.segment.is_being_extended = False

    def seal(self) -> None:
        """From now on nothing is planned or recorded."""
        self._is_sealed = True

    def rollout(
        self, reward: float, metrics: Mapping[str, float], prompts: GroupPrompts, failed_episodes: int = 0
    ) -> Rollout:
        """The episode on the wire; `prompts`: of its group so far. There must be at least one turn."""
        assert self._is_sealed and self.num_turns, "only an episode that is over and has a reply is a rollout"
        return Rollout(
            segments=[segment.to_wire(prompts.place(segment.prompt)) for segment in self._segments],
            reward=reward,
            finish_reason=self._finish_reason,
            text=self.text,
            turns=[turn for place, segment in enumerate(self._segments) for turn in segment.turns(place)],
            metrics=dict(metrics),
            failed_episodes=failed_episodes,
        )

    def _segment_for(self, conversation: Conversation) -> tuple[RecordedSegment, list[int]]:
        """The segment in which the conversation goes on, and the bridge behind it; or a new one, and no bridge."""
        before = self._segment_before(conversation)
        if before is not None:
            following = conversation.messages[before.num_messages :]
            if self._rendering.keeps_history(following, before.is_reasoned):
                bridge = self._rendering.behind(before.reply, before.tokens[-1], following, conversation.tools)
                if bridge is not None:
                    return before, bridge
        prompt = self._whole(conversation)
        starts = [one for one in self._segments if not one.is_being_extended and one.begins(prompt)]
        if starts:
            longest = max(starts, key=lambda one: one.num_tokens)
            return longest, prompt[longest.num_tokens :]
        return RecordedSegment(conversation, prompt, self._origin(conversation, before is not None)), []

    def _segment_before(self, conversation: Conversation) -> RecordedSegment | None:
        """A segment whose messages the conversation continues with messages that are not the assistant's: with the
        assistant's, the agent would put words into the model's mouth, or a longer segment would fit."""
        found = (
            one
            for one in self._segments
            if not one.is_being_extended
            and one.tools_key == conversation.tools_key
            and one.precedes(conversation)
            and all(form.role != "assistant" for form in conversation.forms[one.num_messages :])
        )
        return next(found, None)

    def _whole(self, conversation: Conversation) -> list[int]:
        if self._ticket.prompt_tokens and self._question is not None and conversation.equals(self._question):
            return self._ticket.prompt_tokens
        return self._rendering.whole(conversation.messages, conversation.tools)

    def _origin(self, conversation: Conversation, is_continued: bool) -> SegmentOrigin:
        """Of a new segment; `is_continued`: its messages continue another's."""
        if is_continued:
            return "template"
        openings = [one.opening for one in self._segments]
        for place, opening in enumerate(openings):
            if opening.equals(conversation):
                return self._segments[place].origin
        others = [one for one in self._segments if one.tools_key != conversation.tools_key]
        if any(one.precedes(conversation) or one.opening.forms == conversation.forms for one in others):
            return "tools"
        return "history" if any(opening.begins_like(conversation) for opening in openings) else "conversation"

    def _expect(self, condition: bool, limit: LimitName) -> None:
        if not condition:
            self._finish_reason = limit
            raise LimitReached(limit)

    def _expect_open(self) -> None:
        if self._is_sealed:
            raise EpisodeOver


def _question(ticket: Ticket) -> Conversation | None:
    """Of the ticket; None if its messages are not understood, as a request that repeats them is told."""
    try:
        return Conversation([to_message(message, place) for place, message in enumerate(ticket.messages)], ticket.tools)
    except BadRequest:
        return None
