"""A model without weights for tests of episodes: what it samples is random, and its log-probabilities are a hash of all
the tokens before, so that a token behind any other context than its own shows."""

import functools
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.common.models.bridge import Bridge
from headrace.common.models.chat_template import QUESTION
from headrace.common.wire import Group, Limits, Rollout, Sampling, Ticket, Timings, VersionSpan
from headrace.generation.engine.completions import Completion, SampledTurn
from headrace.generation.gateway.rendering import Rendering
from tests.support.chat_families import FAMILIES, TOKENIZERS, chat_of

LIMITS = Limits(max_turns=12, max_tokens=400, max_context_tokens=2000, max_segments=8)
TEXTS = ("It is 7.", " 3 + 4 = 7\n", "", "so so so", "the <i>theory</i>", "é")


@functools.cache
def rendering_of(name: str, **settings: Any) -> Rendering:
    """Of a family of `chat_families`."""
    return Rendering(Bridge(chat_of(name), stop_ids(name)), **settings)


def stop_ids(name: str) -> list[int]:
    found: list[int] = TOKENIZERS[name].convert_tokens_to_ids(list(FAMILIES[name].ends))
    return found


def episode_ticket(name: str, **changes: Any) -> Ticket:
    """A ticket of one question, rendered by the family's template."""
    messages, tools = changes.get("messages", [QUESTION]), changes.get("tools", [])
    fields: dict[str, Any] = {
        "id": "0-0",
        "kind": "train",
        "prompt_tokens": rendering_of(name).whole(messages, tools) if messages else [],
        "messages": messages,
        "reference": {},
        "num_completions": 1,
        "sampling": Sampling(1.0, 24, stop_ids(name)),
        "min_weight_version": 0,
        "limits": LIMITS,
    }
    return Ticket(**fields | changes)


def group_of(ticket: Ticket, rollout: Rollout, further: list[np.ndarray]) -> Group:
    return Group(ticket, [rollout], "replica", Timings(1.0, 2.0, 3.0), further)


class FakeModel:
    """Samples for one family; `asked` has the context and the tokens of every reply."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.tokenizer = TOKENIZERS[name]
        self.stops = stop_ids(name)
        self.random = random.Random(seed)
        self.version = 1
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def sample(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        text: str | None = None,
        tokens: Sequence[int] | None = None,
    ) -> SampledTurn:
        """Random tokens, or those of `text`, or `tokens`, as many as fit, then a stop token if it fits (the family's
        first if the reply is not random); versions change now and then between two tokens."""
        stop = self.stops[0]
        if text is not None:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        elif tokens is None:
            tokens, stop = self._random_tokens(), self.random.choice(self.stops)
        tokens = [*tokens, stop][:max_new_tokens]
        is_stopped = tokens[-1] in self.stops
        said = self.tokenizer.decode(tokens[:-1] if is_stopped else tokens, skip_special_tokens=False)
        completion = Completion(
            tokens=tokens,
            behaviour_logprobs=logprobs(prompt_tokens, tokens),
            version_spans=self._spans(len(tokens)),
            finish_reason="stop" if is_stopped else "length",
            text=said,
        )
        self.asked.append((tuple(prompt_tokens), tuple(tokens)))
        return SampledTurn(completion, cached_tokens=min(3, len(prompt_tokens)))

    def _random_tokens(self) -> list[int]:
        if self.random.random() < 0.7:
            encoded: list[int] = self.tokenizer.encode(self.random.choice(TEXTS), add_special_tokens=False)
            return encoded
        tokens = [self.random.randrange(len(self.tokenizer)) for _ in range(self.random.randint(0, 6))]
        return [token for token in tokens if token not in self.stops]

    def _spans(self, num_tokens: int) -> list[VersionSpan]:
        cut = self.random.randint(1, num_tokens)
        spans = [VersionSpan(self.version, 0, cut)]
        if cut < num_tokens:
            self.version += 1
            spans.append(VersionSpan(self.version, cut, num_tokens))
        return spans


def logprobs(context: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """float32, of each token a hash of all tokens up to it."""
    whole = np.array([*context, *tokens], np.int32)
    ends = range(len(context) + 1, len(whole) + 1)
    return np.array([-(zlib.crc32(whole[:end].tobytes()) % 4000) / 1000 for end in ends], np.float32)


def check_exact(group: Group, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Every reply stands in exactly one segment, behind exactly the tokens that it was sampled behind."""
    (rollout,) = group.rollouts
    recorded: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for turn in rollout.turns:
        if turn.role == "assistant":
            segment = rollout.segments[turn.segment]
            context = (*group.prompt(segment), *segment.tokens[: turn.start].tolist())
            recorded[tuple(map(int, context)), tuple(segment.tokens[turn.start : turn.end].tolist())] += 1
    assert recorded == Counter(asked)
    for segment in rollout.segments:
        expected = logprobs(list(map(int, group.prompt(segment))), segment.tokens.tolist())
        mask = np.frombuffer(segment.loss_mask, np.uint8) == 1
        assert np.array_equal(expected[mask], segment.behaviour_logprobs)
