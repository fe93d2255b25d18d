"""One token sequence of an episode while it grows: a prompt, then replies and what stands between them. Pure."""

from collections.abc import Sequence

import msgspec
import numpy as np

from headrace.common.wire import Message, Role, Segment, SegmentOrigin, Turn, VersionSpan
from headrace.generation.engine.completions import Completion, SampledTurn
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.messages import MessageForm, form_of, is_prefix


class RecordedSegment:
    """Begins with the request `opening`, rendered to `prompt`; the first reply follows at once."""

    def __init__(self, opening: Conversation, prompt: list[int], origin: SegmentOrigin) -> None:
        self.opening = opening
        self.tools_key = opening.tools_key
        self.prompt = prompt
        self.origin = origin
        self.tokens: list[int] = []
        """Behind the prompt."""
        self.reply: Message = {}
        """The last."""
        self.is_reasoned = False
        """Whether a reply has reasoning."""
        self.is_being_extended = False
        self.num_sampled = 0
        self._forms: list[MessageForm] = []
        self._mask = bytearray()
        self._logprobs: list[np.ndarray] = []
        self._spans: list[VersionSpan] = []
        self._turns: list[Turn] = []

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def num_messages(self) -> int:
        return len(self._forms)

    def precedes(self, conversation: Conversation) -> bool:
        """Whether the conversation consists of the recorded messages and more."""
        return len(conversation.forms) > len(self._forms) and is_prefix(self._forms, conversation.forms)

    def begins(self, tokens: list[int]) -> bool:
        """Whether the tokens begin with all of the segment's."""
        end = len(self.prompt)
        return tokens[:end] == self.prompt and tokens[end : self.num_tokens] == self.tokens

    def append(
        self,
        conversation: Conversation,
        bridge: list[int],
        sampled: SampledTurn,
        reply: Message,
        times: tuple[float, float],
    ) -> None:
        """A reply to the conversation, as the client was sent it, behind the bridge; `times` are the unix times of the
        request and of the reply."""
        began_s, ended_s = times
        if bridge:
            role = _role_between(conversation.messages[self.num_messages :])
            self._append(role, bridge, 0, (self._turns[-1].ended_s, began_s))
        self._append("assistant", sampled.completion.tokens, 1, (began_s, ended_s), sampled.cached_tokens)
        self._append_sampled(sampled.completion)
        self.tools_key = conversation.tools_key
        self._forms = [*conversation.forms, form_of(reply)]
        self.reply = reply
        self.is_reasoned = self.is_reasoned or bool(self._forms[-1].reasoning)

    def to_wire(self, prompt: int) -> Segment:
        """`prompt`: index of its prompt in the group."""
        return Segment(
            prompt=prompt,
            tokens=np.array(self.tokens, np.int32),
            loss_mask=bytes(self._mask),
            behaviour_logprobs=np.concatenate(self._logprobs),
            version_spans=list(self._spans),
            origin=self.origin,
        )

    def turns(self, segment: int) -> list[Turn]:
        """`segment`: index of this one in its rollout."""
        return [msgspec.structs.replace(turn, segment=segment) for turn in self._turns]

    def _append(
        self, role: Role, tokens: list[int], mask: int, times: tuple[float, float], cached_tokens: int = 0
    ) -> None:
        start = len(self.tokens)
        self.tokens += tokens
        self._mask += bytes([mask]) * len(tokens)
        began_s, ended_s = times
        self._turns.append(Turn(role, 0, start, len(self.tokens), began_s, max(began_s, ended_s), cached_tokens))

    def _append_sampled(self, completion: Completion) -> None:
        self._logprobs.append(completion.behaviour_logprobs)
        for version, start, end in ((one.version, one.start, one.end) for one in completion.version_spans):
            if self._spans and self._spans[-1].version == version:
                start = self._spans.pop().start - self.num_sampled
            self._spans.append(VersionSpan(version, self.num_sampled + start, self.num_sampled + end))
        self.num_sampled += len(completion.tokens)


def _role_between(messages: Sequence[Message]) -> Role:
    """Of the tokens that are not sampled: the role of the first message that is not the assistant's."""
    roles: list[Role] = [message["role"] for message in messages if message["role"] != "assistant"]
    return roles[0] if roles else "user"
