"""Samples of settled groups, for people to read (headrace/common/wire/group_samples.py).

They are bounded: the first few of each state in every step, and of every evaluation. The texts of a completion's
tokens, joined, are its text: a token that ends inside a character has an empty text, and the one that completes it has
all of it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from headrace.common.wire import DecidedState, Group, Rollout
from headrace.common.wire.group_samples import MAX_SAMPLE_BYTES, GroupSample, RolloutSample

MAX_SAMPLED = {"trained": 4, "uniform": 1, "stale": 1, "evaluated": 8}
LONGEST_CHARACTER_TOKENS = 4
"""A character has at most 4 bytes in UTF-8."""
_HALF = "\N{REPLACEMENT CHARACTER}"


class DecidedGroup(NamedTuple):
    group: Group
    state: DecidedState
    step: int
    staleness: int | None
    decided_s: float


class TrainedRollout(NamedTuple):
    """What the trainer computed for a rollout of its latest step."""

    advantage: float
    proximal_logprobs: np.ndarray


class SampleCollector:
    """Needs a lock around it if several threads use it."""

    def __init__(self) -> None:
        self._waiting: list[DecidedGroup] = []
        self._taken: Counter[str] = Counter()

    def add(self, group: Group, state: DecidedState, step: int, staleness: int | None) -> None:
        if self._taken[state] < MAX_SAMPLED[state]:
            self._taken[state] += 1
            self._waiting.append(DecidedGroup(group, state, step, staleness, time.time()))

    def restart(self, *states: DecidedState) -> None:
        """A step or an evaluation begins: groups of these states are sampled again."""
        for state in states:
            self._taken[state] = 0

    def take(self) -> list[DecidedGroup]:
        waiting, self._waiting = self._waiting, []
        return waiting


class TokenTexts:
    """The text of each token of a completion, by the model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        texts = [self._text_alone(token) for token in tokens]
        return texts if "".join(texts) == self._decode(tokens) else self._in_context(tokens)

    def _text_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _in_context(self, tokens: Sequence[int]) -> list[str]:
        """Each token's text is what it adds to the text before it."""
        texts = []
        first = done = 0
        for end in range(1, len(tokens) + 1):
            before, text = self._decode(tokens[first:done]), self._decode(tokens[first:end])
            if text.endswith(_HALF) and end < len(tokens) and end - done < LONGEST_CHARACTER_TOKENS:
                texts.append("")
                continue
            texts.append(text[len(before) :])
            first, done = done, end
        return texts

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def group_sample(decided: DecidedGroup, trained: Sequence[TrainedRollout | None], texts: TokenTexts) -> GroupSample:
    """`trained`: of each rollout, or empty. Completions that would make it too large are left out, from the last."""
    group, state, step, staleness, decided_s = decided
    ticket, timings = group.ticket, group.timings
    rollouts = []
    num_bytes = len(msgspec.json.encode(ticket.messages))
    for index, rollout in enumerate(group.rollouts):
        sample = _rollout_sample(rollout, trained[index] if trained else None, texts)
        num_bytes += len(msgspec.json.encode(sample))
        if num_bytes > MAX_SAMPLE_BYTES - 4096:  # 4096: for the other fields
            break
        rollouts.append(sample)
    return GroupSample(
        id=ticket.id,
        kind=ticket.kind,
        state=state,
        step=step,
        issued_step=ticket.issued_step,
        staleness=staleness,
        replica=group.replica,
        prompt=ticket.messages,
        rollouts=rollouts,
        leased_s=timings.leased_s,
        sampled_s=timings.sampled_s,
        scored_s=timings.scored_s,
        decided_s=decided_s,
        num_left_out=len(group.rollouts) - len(rollouts),
    )


def _rollout_sample(rollout: Rollout, trained: TrainedRollout | None, texts: TokenTexts) -> RolloutSample:
    tokens = [
        text
        for segment in rollout.segments
        for text, mask in zip(texts(segment.tokens.tolist()), segment.loss_mask, strict=True)
        if mask
    ]
    return RolloutSample(
        text=rollout.text,
        reward=rollout.reward,
        advantage=None if trained is None else round(trained.advantage, 4),
        finish_reason=rollout.finish_reason,
        tokens=tokens,
        versions=[span.version for span in rollout.version_spans for _ in range(span.start, span.end)],
        behaviour_logprobs=_rounded(np.concatenate([segment.behaviour_logprobs for segment in rollout.segments])),
        proximal_logprobs=None if trained is None else _rounded(trained.proximal_logprobs),
    )


def _rounded(logprobs: np.ndarray) -> list[float]:
    found: list[float] = np.round(logprobs.astype(np.float64), 4).tolist()
    return found
