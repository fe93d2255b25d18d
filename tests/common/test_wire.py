"""The wire format: what goes out comes back, and what is anything else is refused with a reason, whatever it is."""

from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from headrace.common.wire import (
    Group,
    Heartbeat,
    Limits,
    Sampling,
    Turn,
    VersionSpan,
    WireError,
    check_group,
    decode_group,
    decode_heartbeat,
    decode_ticket,
    encode,
)
from headrace.common.wire.checks import is_url
from tests.support.factories import make_group, make_rollout, make_segment, make_ticket
from tests.support.poisons import altered

LIMITS = Limits(max_turns=2, max_tokens=6, max_context_tokens=12, max_segments=2)
HEARTBEAT = Heartbeat("r", "http://x", "running", "", 3, 1, 2, 30, 0.5, 2.0)


def test_groups_come_back_as_they_were() -> None:
    group = make_group(rewards=(1.0, 0.0, 0.5))
    again = decode_group(encode(group))
    assert again.ticket == group.ticket and again.timings == group.timings
    for one, other in zip(again.segments, group.segments, strict=True):
        assert np.array_equal(one.behaviour_logprobs, other.behaviour_logprobs)
        assert one.behaviour_logprobs.dtype == np.float32
        assert np.array_equal(one.tokens, other.tokens) and one.tokens.dtype == np.int32
        assert (one.loss_mask, one.version_spans) == (other.loss_mask, other.version_spans)
    assert again.rewards == group.rewards


def test_tickets_and_heartbeats_come_back_as_they_were() -> None:
    reference = {"cases": [[1, 2.5, None], {"é": True}], "answer": "2"}
    ticket = make_ticket(kind="eval", attempts=2, avoid=["x"], reference=reference)
    assert decode_ticket(encode(ticket)) == ticket
    assert decode_heartbeat(encode(HEARTBEAT)) == HEARTBEAT


def test_several_turns_fit_a_rollout() -> None:
    """Tool output between two turns is masked; log-probabilities and spans cover the trained tokens alone."""
    rollout = make_rollout(
        tokens=(8, 9, 50, 51, 10, 1),
        loss_mask=bytes([1, 1, 0, 0, 1, 1]),
        behaviour_logprobs=np.full(4, -0.1, np.float32),
        version_spans=[VersionSpan(1, 0, 2), VersionSpan(3, 2, 4)],
    )
    group = replace(make_group(rewards=(1.0,)), rollouts=[rollout])
    again = decode_group(encode(group))
    assert (again.oldest_version, again.newest_version, again.num_trained_tokens) == (1, 3, 4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss_mask": bytes([1, 1])}, "2 mask entries for 3 tokens"),
        ({"loss_mask": bytes(3)}, "no trained token"),
        ({"loss_mask": bytes([1, 2, 0])}, "other than 0 and 1"),
        ({"behaviour_logprobs": np.zeros(2, np.float32)}, "2 behaviour_logprobs for 3 trained tokens"),
        ({"behaviour_logprobs": np.zeros(0, np.float32)}, "0 behaviour_logprobs for 3 trained tokens"),
        ({"behaviour_logprobs": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({"behaviour_logprobs": np.array([0, 0.5, 0], np.float32)}, "is above 0"),
        ({"behaviour_logprobs": np.array([0, -81, 0], np.float32)}, "is below -80"),
        ({"reward": float("nan")}, "the reward nan is not finite"),
        ({"reward": -1e31}, "beyond 1e.30"),
        ({"tokens": np.array([1, -1, 3], np.int32)}, "token -1, expected 0 to 2147483647"),
        ({"version_spans": [VersionSpan(1, 0, 2)]}, "do not tile 3 tokens"),
        ({"version_spans": [VersionSpan(1, 0, 2), VersionSpan(2, 1, 3)]}, "do not tile 3 tokens"),
        ({"version_spans": [VersionSpan(1, 0, 0), VersionSpan(2, 0, 3)]}, "do not tile 3 tokens"),
        ({"version_spans": []}, "do not tile 3 tokens"),
    ],
)
def test_rollouts_that_contradict_themselves_are_refused(changes: dict[str, object], problem: str) -> None:
    group = make_group(rewards=(1.0, 0.0))
    broken = replace(group, rollouts=[group.rollouts[0], make_rollout(**changes)])  # type: ignore[arg-type]
    with pytest.raises(WireError, match=f"group 0-0, rollout 1: .*{problem}"):
        decode_group(encode(broken))
    with pytest.raises(WireError, match=problem):
        check_group(broken)


def test_other_payloads_are_refused() -> None:
    with pytest.raises(WireError, match="cannot decode 7 bytes"):
        decode_group(b"garbage")
    with pytest.raises(WireError, match="schema 99, expected 1 or 2 or 3"):
        decode_ticket(encode(make_ticket(schema=99)))
    with pytest.raises(WireError, match="no prompt tokens"):
        decode_ticket(encode(make_ticket(prompt_tokens=[])))
    missing = replace(make_group(), rollouts=[make_rollout()])
    with pytest.raises(WireError, match="1 rollouts, expected 2"):
        decode_group(encode(missing))


def test_groups_of_a_nameless_replica_are_refused() -> None:
    with pytest.raises(WireError, match="group 0-0: replica is empty"):
        decode_group(encode(replace(make_group(), replica="")))


@pytest.mark.parametrize("array", ["tokens", "behaviour_logprobs"])
def test_tokens_and_log_probabilities_are_whole_numbers_of_four_bytes(array: str) -> None:
    with pytest.raises(WireError, match=f"11 bytes of {array}, expected 4 for each"):
        decode_group(altered(encode(make_group()), ("rollouts", 0, "segments", 0, array), bytes(11)))


def test_only_int32_tokens_have_a_wire_form() -> None:
    """Wider integers would be cut off in silence."""
    wide = make_rollout(tokens=np.array([1, 2**40, 3]))
    with pytest.raises(NotImplementedError, match="int64 has no wire form"):
        encode(replace(make_group(rewards=(1.0,)), rollouts=[wide]))


def test_a_group_is_uniform_by_its_raw_rewards() -> None:
    assert make_group(rewards=(0.0, 0.0)).is_uniform("train")
    assert not make_group(rewards=(0.0, 1e-9)).is_uniform("train")
    assert make_group(rewards=(0.1 + 0.2, 0.3)).is_uniform("train") and make_group(
        rewards=(0.1 + 0.2 - 0.3, 0.0)
    ).is_uniform("train")
    assert make_group(rewards=(-1 / 3, float(np.float32(-1 / 3)))).is_uniform("train")
    assert not make_group(rewards=(1.0, 1.00001)).is_uniform("train")


def test_what_was_cut_off_counts_or_does_not() -> None:
    group = make_group(rewards=(1.0, 1.0, 0.0))
    cut = replace(group, rollouts=[*group.rollouts[:2], replace(group.rollouts[2], finish_reason="length")])
    assert not cut.is_uniform("train") and cut.is_uniform("mask")
    assert cut.trainable_rollouts("train") == cut.rollouts and cut.trainable_rollouts("mask") == cut.rollouts[:2]
    assert replace(cut, rollouts=cut.rollouts[2:]).is_uniform("mask"), "nothing is left to learn from"


def test_a_rollout_token_costs_about_nine_bytes() -> None:
    """Token id, mask, float32 log-probability: what admission and memory estimates count with."""
    long = make_rollout(
        tokens=tuple([70_000] * 1000),
        loss_mask=b"\1" * 1000,
        behaviour_logprobs=np.full(1000, -0.5, np.float32),
        version_spans=[VersionSpan(1, 0, 1000)],
    )
    group: Group = replace(make_group(rewards=(1.0,)), rollouts=[long])
    assert len(encode(group)) < 10.5 * 1000


def test_rounding_may_take_a_log_probability_above_0() -> None:
    group = make_group(rewards=(1.0,))
    rounded = make_rollout(behaviour_logprobs=np.array([0, 9e-4, -80], np.float32))
    decode_group(encode(replace(group, rollouts=[rounded])))


def test_a_rollout_is_no_longer_than_was_asked_for() -> None:
    """Tokens of tools do not count."""
    sampling = Sampling(temperature=1.0, max_new_tokens=2, stop_token_ids=[])
    spans = [VersionSpan(1, 0, 2)]
    two = make_rollout(loss_mask=bytes([1, 0, 1]), behaviour_logprobs=np.zeros(2, np.float32), version_spans=spans)
    group = replace(make_group(rewards=(1.0,), sampling=sampling), rollouts=[two])
    decode_group(encode(group))
    with pytest.raises(WireError, match="3 trained tokens, more than the ticket's max_new_tokens 2"):
        decode_group(encode(replace(group, rollouts=[make_rollout()])))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"id": ""}, "ticket id is empty"),
        ({"id": "x" * 201}, "ticket id has 201 characters, more than 200"),
        ({"id": "a b"}, "'a b' has characters that are whitespace"),
        ({"id": "a\nb"}, r"'a\\nb' has characters that are whitespace or cannot be printed"),
        ({"kind": "test"}, "Invalid enum value 'test'"),
        ({"prompt_tokens": [3, -1]}, "a prompt with token -1"),
        ({"prompt_tokens": [1] * 2**20, "num_completions": 33}, "33 completions of 1048576 prompt tokens"),
        ({"prompt_tokens": [1] * (2**20 + 1)}, "length <= 1048576"),
        ({"num_completions": 0}, "asks for 0 completions"),
        ({"num_completions": 2**40}, "asks for 1099511627776 completions"),
        ({"sampling": Sampling(0.0, 1, [])}, "temperature 0, expected"),
        ({"sampling": Sampling(float("nan"), 1, [])}, "temperature nan, expected"),
        ({"sampling": Sampling(1e-50, 1, [])}, "temperature 1e-50, expected"),
        ({"sampling": Sampling(1e50, 1, [])}, "temperature 1e.50, expected"),
        ({"sampling": Sampling(1.0, 0, [])}, "max_new_tokens 0, expected"),
        ({"sampling": Sampling(1.0, 1, [2**40])}, "stops at token 1099511627776"),
        ({"min_weight_version": -1}, "Expected `int` >= 0"),
        ({"min_weight_version": 2**53}, "Expected `int` <= 9007199254740991"),
        ({"avoid": ["a", ""]}, "avoids a replica whose name is empty"),
        ({"reference": {"x": float("inf")}}, "a number that is not finite"),
        ({"reference": {"x": {1: 2}}}, "keys that are not text"),
        ({"reference": {"x": b"1"}}, "with a bytes, which JSON does not have"),
        ({"reference": {"x": "1" * 2**20}}, "reference of 1048584 bytes, more than 1048576"),
        ({"messages": [{}] * 4097}, "length <= 4096"),
        ({"messages": [{"role": 3}]}, "message 0 whose role is a int, expected text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 0 whose content is a list, expected text"),
        ({"messages": [{"role": "user", "x": b""}]}, "a message with a bytes, which JSON does not have"),
        ({"tools": [{"function": {"name": "f"}}]}, "has tools, but no limits"),
        ({"tools": [{"function": {}}], "limits": LIMITS}, "tool 0 without the name of a function"),
        ({"tools": [{"function": {"name": "x" * 2**18}}], "limits": LIMITS}, "tools of .* bytes, more than 262144"),
        ({"limits": Limits(0, 1, 1, 1)}, "the limit max_turns 0, expected 1 to 4096"),
        ({"limits": Limits(1, 1, 2**21, 1)}, "the limit max_context_tokens 2097152, expected 1 to 1048576"),
    ],
)
def test_tickets_that_cannot_be_answered_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        decode_ticket(encode(make_ticket(**changes)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"replica": ""}, "replica is empty"),
        ({"replica": "a b"}, "replica 'a b' has"),
        ({"url": "ftp://x"}, "'ftp://x' is no URL"),
        ({"url": "http://" + "x" * 500}, "is no URL"),
        ({"weight_version": 2**53}, "Expected `int` <= 4503599627370496"),
        ({"groups_in_flight": -1}, "Expected `int` >= 0"),
        ({"serving_s": float("nan")}, "Expected `float` >= 0"),
        ({"serving_s": float("inf")}, "Expected `float` <= "),
        ({"waiting_s": -1.0}, "Expected `float` >= 0"),
        ({"waiting_s": 3.0}, "waited 3 s of 2 s"),
        ({"reason": "x" * 2**16}, "bytes, more than 65536"),
        ({"schema": 4}, "schema 4, expected 1 or 2 or 3"),
    ],
)
def test_heartbeats_that_cannot_be_true_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        decode_heartbeat(encode(replace(HEARTBEAT, **changes)))


def test_tickets_and_heartbeats_of_earlier_releases_are_read() -> None:
    """What waits in Redis at an upgrade: tickets of schema 1 know no stop texts, those of schema 2 no limits."""
    for schema, unknown in ((1, ["stop"]), (2, [])):
        tree = msgspec.msgpack.decode(encode(make_ticket()))
        tree["schema"] = schema
        for name in unknown:
            del tree["sampling"][name]
        del tree["tools"], tree["limits"]
        assert decode_ticket(msgspec.msgpack.encode(tree)) == make_ticket()
        assert decode_heartbeat(encode(replace(HEARTBEAT, schema=schema))).replica == "r"


def test_groups_of_schema_2_are_read_as_one_segment_behind_the_tickets_prompt() -> None:
    group = make_group(rewards=(1.0, 0.5))
    tree = msgspec.msgpack.decode(encode(group))
    rollouts = [
        {name: value for name, value in one["segments"][0].items() if name not in ("prompt", "origin")}
        | {name: one[name] for name in ("reward", "finish_reason", "text")}
        for one in tree["rollouts"]
    ]
    ticket = {name: value for name, value in tree["ticket"].items() if name not in ("tools", "limits")} | {"schema": 2}
    del tree["prompts"]
    again = decode_group(msgspec.msgpack.encode(tree | {"rollouts": rollouts, "ticket": ticket, "schema": 2}))
    assert encode(again) == encode(group)


def an_episode(**changes: Any) -> Group:
    """Two turns with a tool's answer between them, then a turn behind a rewritten history."""
    first = make_segment(
        (8, 9, 50, 51, 10, 1),
        loss_mask=bytes([1, 1, 0, 0, 1, 1]),
        behaviour_logprobs=np.full(4, -0.1, np.float32),
        version_spans=[VersionSpan(1, 0, 2), VersionSpan(3, 2, 4)],
    )
    second = make_segment((8, 1), prompt=1, origin="history")
    turns = [Turn("assistant", 0, 0, 2, 1.0, 2.0), Turn("tool", 0, 2, 4, 2.0, 3.0)]
    turns += [Turn("assistant", 0, 4, 6, 3.0, 4.0, 5), Turn("assistant", 1, 0, 2, 5.0, 6.0)]
    rollout = make_rollout(segments=[first, second], turns=turns, metrics={"guesses": 3.0}, failed_episodes=1)
    group = make_group(rewards=(1.0,), tools=[{"function": {"name": "f"}}], limits=Limits(3, 6, 12, 2))
    changed = replace(rollout, **{name: value for name, value in changes.items() if name in rollout.__struct_fields__})
    return replace(
        group,
        rollouts=[changed],
        prompts=changes.get("prompts", [np.array([3, 4], np.int32)]),
        ticket=replace(group.ticket, limits=changes.get("limits", group.ticket.limits)),
    )


def test_an_episode_comes_back_as_it_was() -> None:
    group = an_episode()
    again = decode_group(encode(group))
    assert encode(again) == encode(group)
    assert (again.oldest_version, again.newest_version, again.num_trained_tokens) == (1, 3, 6)
    assert [list(again.prompt(segment)) for segment in again.segments] == [[5, 6, 7], [3, 4]]
    opened = replace(again.ticket, prompt_tokens=[], messages=[])
    assert decode_ticket(encode(opened)) == opened, "the environment opens the conversation"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompts": []}, "a segment behind prompt 1 of 0"),
        ({"prompts": [np.array([3], np.int32), np.array([4], np.int32)]}, "a prompt 2 that no segment uses"),
        ({"prompts": [np.zeros(0, np.int32)]}, "an empty prompt 1"),
        ({"prompts": [np.array([-3], np.int32)]}, "a prompt with token -3"),
        ({"prompts": [np.array([5, 6, 7], np.int32)]}, "the same prompt twice"),
        ({"limits": Limits(2, 6, 12, 2)}, "3 turns, more than the ticket's limit of 2"),
        ({"limits": Limits(3, 5, 12, 2)}, "6 trained tokens, more than the ticket's limit of 5"),
        ({"limits": Limits(3, 6, 8, 2)}, "a segment of 9 tokens, more than the ticket's limit of 8"),
        ({"limits": Limits(3, 6, 12, 1)}, "2 segments, more than the ticket's limit of 1"),
        ({"turns": []}, "the replies are not the sampled tokens of segment 0"),
        ({"turns": [Turn("assistant", 5, 0, 2, 1.0, 2.0)]}, "turn 0 has tokens 0 to 2 of segment 5"),
        ({"turns": [Turn("user", 0, 2, 1, 1.0, 2.0)]}, "turn 0 has tokens 2 to 1 of segment 0"),
        ({"metrics": {"a b": 1.0}}, "a metric is named 'a b'"),
        ({"metrics": {"x": float("inf")}}, "the metric x is inf"),
    ],
)
def test_episodes_that_contradict_themselves_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        decode_group(encode(an_episode(**changes)))


def test_a_replica_of_the_release_before_refuses_a_ticket_rather_than_pass_over_its_stop_texts() -> None:
    ticket = make_ticket(sampling=replace(make_ticket().sampling, stop=["\n\n"]))
    assert msgspec.msgpack.decode(encode(ticket))["schema"] != 1 and decode_ticket(encode(ticket)) == ticket


@pytest.mark.parametrize(
    "stop", [[""], ["x" * 61], ["x"] * 33, [None], "x"], ids=["empty", "long", "many", "none", "text"]
)
def test_stop_texts_that_an_engine_would_refuse_are_refused(stop: Any) -> None:
    with pytest.raises(WireError):
        decode_ticket(altered(encode(make_ticket()), ("sampling", "stop"), stop))


def test_another_layout_is_refused_by_the_schema_that_it_names() -> None:
    with pytest.raises(WireError, match=r"^schema 4, expected 1 or 2 or 3$"):
        decode_ticket(msgspec.msgpack.encode({"schema": 4, "identity": "0-0"}))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://a_b-c.example", "http://[::1]:80/x", "http://123456"]
)
def test_urls_that_replicas_have_pass(url: str) -> None:
    assert is_url(url)


@pytest.mark.parametrize(
    "url",
    ["", "x", "http://", "http://a b", "http://a..b", "http://1.2.3.999", "http://[1]", "http://a:65536", "http://a?b"],
)
def test_other_urls_do_not(url: str) -> None:
    assert not is_url(url)


def test_what_is_unknown_to_this_release_is_passed_over() -> None:
    assert decode_ticket(altered(encode(make_ticket()), ("colour",), "blue")) == make_ticket()
