"""The groups that people may read: token by token, bounded, and what the trainer knows of them."""

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
import tokenizers
from transformers import PreTrainedTokenizerFast

from headrace.common.config import ModelConfig
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, Rollout, Segment, Turn, VersionSpan
from headrace.common.wire.group_samples import MAX_SAMPLE_BYTES, MAX_TEXT_CHARS, GroupSample, SegmentSample
from headrace.learner.intake.samples import (
    MAX_SAMPLED,
    DecidedGroup,
    SampleCollector,
    TrainedRollout,
)
from headrace.learner.reporting.group_samples import group_sample
from headrace.learner.reporting.token_texts import TokenTexts
from tests.learner.test_trainer import STEPS as VERSION_STEPS
from tests.learner.test_trainer import make_batch, make_config, make_trainer
from tests.support.factories import make_group, make_rollout
from tests.support.replay import STEPS, assemble_loop, end, make_recording

TEXT = "Anna zählt 3 Äpfel 🍎, 日本 — fertig."


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A token per byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: place for place, symbol in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def episode_group(tokenizer: Any, turns: Sequence[tuple[str, str, str]], num_rollouts: int = 1) -> Group:
    """Of segment, role and text of each turn. The first segment has the ticket's prompt and version 3; the next ones
    have prompts and versions of their own."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    segments: list[Segment] = []
    recorded: list[Turn] = []
    for index, name in enumerate(dict.fromkeys(name for name, _, _ in turns)):
        tokens: list[int] = []
        mask = b""
        for role, text in ((role, text) for segment, role, text in turns if segment == name):
            new = encode(text)
            place, at = (len(tokens), len(tokens) + len(new)), 10.0 + len(recorded) / 2
            recorded.append(Turn(role, index, *place, at, at + 0.5, cached_tokens=len(recorded)))  # type: ignore[arg-type]
            tokens += new
            mask += (b"\1" if role == "assistant" else b"\0") * len(new)
        num = mask.count(1)
        spans, logprobs = [VersionSpan(3 + index, 0, num)], np.full(num, -0.5, np.float32)
        origin = "history" if index else "conversation"
        segments.append(Segment(np.array(tokens, np.int32), mask, logprobs, spans, index, origin))  # type: ignore[arg-type]
    rollout = Rollout(segments, 1.0, "stop", turns=recorded, metrics={"calls": 1.0}, failed_episodes=2)
    prompts = [np.array(encode(f"prompt of {name}"), np.int32) for name in ("b", "c")[: len(segments) - 1]]
    group = make_group(rewards=(1.0,) * num_rollouts)
    return msgspec.structs.replace(group, rollouts=[rollout] * num_rollouts, prompts=prompts)


def test_tokens_joined_read_as_the_text(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = byte_level.encode(TEXT)
    texts = TokenTexts(byte_level)(tokens)
    assert len(texts) == len(tokens) == len(TEXT.encode()) and "".join(texts) == TEXT
    place = TEXT.encode().index("ä".encode())
    assert texts[place : place + 2] == ["", "ä"], "half a character shows nothing, its end all of it"


def test_bytes_that_are_no_text_are_shown_as_such(byte_level: PreTrainedTokenizerFast) -> None:
    rng = random.Random(3)
    texts = TokenTexts(byte_level)
    for _ in range(50):
        tokens = [rng.randrange(256) for _ in range(40)]
        assert len(texts(tokens)) == 40
    half = byte_level.encode("ä")[:1]
    assert texts([*byte_level.encode("a"), *half]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_a_tokenizer_whose_words_begin_with_a_space_is_read_in_context() -> None:
    """Alone, such a token is read without it."""
    vocabulary = {"▁": 0, "▁the": 1, "▁cat": 2, "s": 3, "<unk>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in vocabulary], unk_id=4))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert TokenTexts(fast)([1, 2, 3]) == ["the", " cat", "s"]


def test_special_tokens_are_shown(demo_policy: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(demo_policy)))
    tokens = [*tokenizer.encode("12 + 3 = 15"), tokenizer.eos_token_id]
    texts = TokenTexts(tokenizer)(tokens)
    assert texts[-1] == tokenizer.eos_token and "".join(texts) == tokenizer.decode(tokens)


def test_a_group_as_it_is_shown(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = byte_level.encode("ab\n")
    rollout = make_rollout(
        0.5,
        tokens=tuple(tokens),
        loss_mask=bytes([1, 0, 1]),
        behaviour_logprobs=np.array([-0.123456, -1.5], np.float32),
        version_spans=[VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)],
    )
    group = msgspec.structs.replace(make_group(rewards=(0.5,), issued_step=6), rollouts=[rollout])
    trained = [TrainedRollout(0.33333, np.array([-0.2, -1.25], np.float32))]
    shown = group_sample(DecidedGroup(group, "trained", 7, 1, 9.0), trained, TokenTexts(byte_level))
    (one,) = shown.rollouts
    assert (one.tokens, one.versions, one.advantage, one.reward) == (["a", "\n"], [3, 4], 0.3333, 0.5)
    assert (one.behaviour_logprobs, one.proximal_logprobs) == ([-0.1235, -1.5], [-0.2, -1.25])
    assert (shown.id, shown.state, shown.step, shown.issued_step, shown.staleness) == ("0-0", "trained", 7, 6, 1)
    assert (shown.prompt, shown.decided_s, shown.num_left_out) == ([{"role": "user", "content": "1 + 1?"}], 9.0, 0)
    (stale,) = group_sample(DecidedGroup(group, "stale", 7, 3, 9.0), [], TokenTexts(byte_level)).rollouts
    assert stale.advantage is None and stale.proximal_logprobs is None


def test_completions_that_would_make_a_group_too_large_are_left_out(byte_level: PreTrainedTokenizerFast) -> None:
    rollouts = [make_rollout(1.0, tokens=(70,) * 20_000) for _ in range(8)]
    group = msgspec.structs.replace(make_group(rewards=(1.0,) * 8), rollouts=rollouts)
    shown = group_sample(DecidedGroup(group, "uniform", 1, 0, 0.0), [], TokenTexts(byte_level))
    assert 0 < len(shown.rollouts) < 8 and len(shown.rollouts) + shown.num_left_out == 8
    size = len(msgspec.json.encode(shown))
    assert MAX_SAMPLE_BYTES * 0.7 < size < MAX_SAMPLE_BYTES


def test_an_episode_is_shown_as_its_turns(byte_level: PreTrainedTokenizerFast) -> None:
    group = episode_group(
        byte_level,
        [("a", "assistant", "ask"), ("a", "tool", " 7é "), ("a", "assistant", "né"), ("b", "assistant", "x")],
    )
    proximal = np.linspace(-1, 0, 7, dtype=np.float32)
    shown = group_sample(
        DecidedGroup(group, "trained", 7, 1, 9.0), [TrainedRollout(1.0, proximal)], TokenTexts(byte_level)
    )
    (one,) = shown.rollouts
    assert shown.prompts == ["prompt of b"] and one.segments == [
        SegmentSample("conversation"),
        SegmentSample("history", 1),
    ]
    assert [(turn.role, turn.segment, turn.start, turn.end, turn.text) for turn in one.turns] == [
        ("assistant", 0, 0, 3, ""),
        ("tool", 0, 3, 3, " 7é "),
        ("assistant", 0, 3, 6, ""),
        ("assistant", 1, 6, 7, ""),
    ]
    assert (one.turns[1].began_s, one.turns[1].ended_s, one.turns[2].cached_tokens) == (10.5, 11.0, 2)
    assert one.tokens == ["a", "s", "k", "n", "", "é", "x"] and one.versions == [3] * 6 + [4]
    assert one.proximal_logprobs == pytest.approx(proximal, abs=1e-4) and len(one.behaviour_logprobs) == 7
    assert (one.metrics, one.failed_episodes, one.num_turns_left_out) == ({"calls": 1.0}, 2, 0)


def test_special_tokens_of_the_environment_are_shown(demo_policy: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(demo_policy)))
    said = f"{tokenizer.eos_token}12 + 3"
    group = episode_group(tokenizer, [("a", "assistant", "15"), ("a", "user", said), ("a", "assistant", "15")])
    shown = group_sample(DecidedGroup(group, "stale", 7, 1, 9.0), [], TokenTexts(tokenizer))
    assert shown.rollouts[0].turns[1].text == said


def test_the_middle_of_a_long_text_is_left_out(byte_level: PreTrainedTokenizerFast) -> None:
    said = "b" + "-" * MAX_TEXT_CHARS + "e"
    group = episode_group(byte_level, [("a", "assistant", "x"), ("a", "tool", said), ("a", "assistant", "y")])
    (one,) = group_sample(DecidedGroup(group, "stale", 7, 1, 9.0), [], TokenTexts(byte_level)).rollouts
    text = one.turns[1].text
    assert text.startswith("b-") and text.endswith("-e") and "\n… 2 characters are left out …\n" in text
    assert one.tokens == ["x", "y"]


def test_the_last_turns_of_an_episode_that_would_be_too_large_are_left_out(byte_level: PreTrainedTokenizerFast) -> None:
    turns = [("a", role, "s" * 3000) for _ in range(12) for role in ("assistant", "tool")]
    turns += [("b", role, "s" * 3000) for _ in range(6) for role in ("assistant", "tool")]
    group = episode_group(byte_level, turns, num_rollouts=3)
    shown = group_sample(DecidedGroup(group, "uniform", 1, 0, 0.0), [], TokenTexts(byte_level))
    assert MAX_SAMPLE_BYTES * 0.8 < len(msgspec.json.encode(shown)) < MAX_SAMPLE_BYTES
    *whole, cut = shown.rollouts
    assert all(len(one.turns) == 36 and not one.num_turns_left_out for one in whole) and cut.num_turns_left_out > 0
    assert len(cut.turns) + cut.num_turns_left_out == 36 and len(shown.rollouts) + shown.num_left_out == 3
    assert len(cut.tokens) == len(cut.versions) == len(cut.behaviour_logprobs) == cut.turns[-1].end
    assert len(cut.segments) == cut.turns[-1].segment + 1


def test_a_sample_is_the_first_of_each_state_until_the_next_step() -> None:
    sample = SampleCollector()
    for _ in range(2):
        for index in range(20):
            sample.add(make_group(f"0-{index}"), "uniform", 1, 0)
            sample.add(make_group(f"0-{index}"), "trained", 1, 0)
            sample.add(make_group(f"eval-1-{index}"), "evaluated", 1, None)
    found = [one.state for one in sample.take()]
    assert {state: found.count(state) for state in set(found)} == {"uniform": 1, "trained": 4, "evaluated": 8}
    sample.add(make_group(), "uniform", 1, 0)
    assert sample.take() == [], "taking them away is no new step"
    sample.restart("uniform")
    sample.add(make_group(), "uniform", 2, 0)
    sample.add(make_group(), "trained", 2, 0)
    assert [one.state for one in sample.take()] == ["uniform"] and MAX_SAMPLED["stale"] == 1


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_trainer_knows_what_it_trained(demo_policy: Path, mini_batches: int) -> None:
    """With a drift of 0 the proximal log-probabilities are those that the completions were sampled with."""
    sections = {"actor": {"group_size": 2, "num_mini_batches": mini_batches}, "learner": {"micro_batch_tokens": 32}}
    trainer = make_trainer(make_config(demo_policy, **sections))
    groups = make_batch(trainer)
    trainer.train(groups, 0, VERSION_STEPS)
    assert len(trainer._latest) > 2
    for group in groups:
        found = [one for one in trainer.trained_rollouts(group) if one is not None]
        assert [one.advantage for one in found] == pytest.approx([-0.7071, 0.7071], abs=1e-3)
        for one, rollout in zip(found, group.rollouts, strict=True):
            assert one.proximal_logprobs == pytest.approx(rollout.segments[0].behaviour_logprobs, abs=1e-4)
    assert trainer.trained_rollouts(make_group("0-99", rewards=(0.0, 1.0))) == [None, None]


def test_a_run_shows_some_groups_of_every_step(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "recording.msgpack")
    loop = assemble_loop(tmp_path, client, keys, recording)
    assert loop.run()
    end(loop)
    entries = [fields for _, fields in client.xrange(keys.samples)]
    groups = [msgspec.json.decode(fields[b"group"], type=GroupSample) for fields in entries]
    for fields, group in zip(entries, groups, strict=True):
        named = {name: fields[name.encode()].decode() for name in ("id", "kind", "state", "step")}
        assert named == {"id": group.id, "kind": "train", "state": group.state, "step": str(group.step)}
    trained = [group for group in groups if group.state == "trained"]
    assert [group.step for group in trained] == [step for step in range(1, STEPS + 1) for _ in range(4)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [group.id for group in trained] == [name for row in rows for name in row["tickets"]]
    for group in trained:
        advantages = [rollout.advantage for rollout in group.rollouts]
        assert len(advantages) == 4 and sum(a or 0 for a in advantages) == pytest.approx(0, abs=1e-3)
        for rollout in group.rollouts:
            assert rollout.proximal_logprobs is not None
            lengths = {len(rollout.tokens), len(rollout.versions), len(rollout.behaviour_logprobs)}
            assert lengths == {len(rollout.proximal_logprobs)}
    assert {group.state for group in groups} >= {"uniform"}
