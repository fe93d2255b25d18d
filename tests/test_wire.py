"""The wire format: what goes out comes back, and what contradicts itself is refused with a reason."""

import msgspec
import numpy as np
import pytest

from common.wire import (
    Group,
    Heartbeat,
    VersionSpan,
    WireError,
    decode_group,
    decode_heartbeat,
    decode_ticket,
    encode,
)
from tests.making import make_group, make_rollout, make_ticket


def test_groups_come_back_as_they_were() -> None:
    group = make_group(rewards=(1.0, 0.0, 0.5))
    again = decode_group(encode(group))
    assert again.ticket == group.ticket and again.timings == group.timings
    for one, other in zip(again.rollouts, group.rollouts, strict=True):
        assert np.array_equal(one.behaviour_logprobs, other.behaviour_logprobs)
        assert one.behaviour_logprobs.dtype == np.float32
        assert (one.tokens, one.version_spans, one.reward) == (other.tokens, other.version_spans, other.reward)


def test_tickets_and_heartbeats_come_back_as_they_were() -> None:
    ticket = make_ticket(kind="eval", attempts=2, avoid=["x"])
    assert decode_ticket(encode(ticket)) == ticket
    heartbeat = Heartbeat("r", "http://x", "running", "", 3, 1, 2, 30, 0.5, 2.0)
    assert decode_heartbeat(encode(heartbeat)) == heartbeat


def test_several_turns_fit_a_rollout() -> None:
    """Tool output between two turns is masked; log-probabilities and spans cover the trained tokens alone."""
    rollout = make_rollout(
        tokens=(8, 9, 50, 51, 10, 1),
        loss_mask=[1, 1, 0, 0, 1, 1],
        behaviour_logprobs=np.full(4, -0.1, np.float32),
        version_spans=[VersionSpan(1, 0, 2), VersionSpan(3, 2, 4)],
    )
    group = msgspec.structs.replace(make_group(rewards=(1.0,)), rollouts=[rollout])
    again = decode_group(encode(group))
    assert (again.oldest_version, again.newest_version, again.num_trained_tokens) == (1, 3, 4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss_mask": [1, 1]}, "2 mask entries for 3 tokens"),
        ({"loss_mask": [0, 0, 0]}, "no trained token"),
        ({"loss_mask": [1, 2, 0]}, "other than 0 and 1"),
        ({"behaviour_logprobs": np.zeros(2, np.float32)}, "2 behaviour_logprobs for 3 trained tokens"),
        ({"behaviour_logprobs": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({"behaviour_logprobs": np.array([0, 0.5, 0], np.float32)}, "is above 0"),
        ({"reward": float("nan")}, "not finite"),
        ({"version_spans": [VersionSpan(1, 0, 2)]}, "do not tile 3 tokens"),
        ({"version_spans": [VersionSpan(1, 0, 2), VersionSpan(2, 1, 3)]}, "do not tile 3 tokens"),
        ({"version_spans": [VersionSpan(1, 0, 0), VersionSpan(2, 0, 3)]}, "do not tile 3 tokens"),
        ({"version_spans": []}, "do not tile 3 tokens"),
    ],
)
def test_rollouts_that_contradict_themselves_are_refused(changes: dict[str, object], problem: str) -> None:
    group = make_group(rewards=(1.0, 0.0))
    broken = msgspec.structs.replace(group, rollouts=[group.rollouts[0], make_rollout(**changes)])  # type: ignore[arg-type]
    with pytest.raises(WireError, match=f"group 0-0, rollout 1: .*{problem}"):
        decode_group(encode(broken))


def test_other_payloads_are_refused() -> None:
    with pytest.raises(WireError, match="cannot decode 7 bytes"):
        decode_group(b"garbage")
    with pytest.raises(WireError, match="schema 99, expected 1"):
        decode_ticket(encode(make_ticket(schema=99)))
    with pytest.raises(WireError, match="no prompt tokens"):
        decode_ticket(encode(make_ticket(prompt_tokens=[])))
    missing = msgspec.structs.replace(make_group(), rollouts=[make_rollout()])
    with pytest.raises(WireError, match="1 rollouts, expected 2"):
        decode_group(encode(missing))


def test_a_group_is_uniform_by_its_raw_rewards() -> None:
    assert make_group(rewards=(0.0, 0.0)).is_uniform
    assert not make_group(rewards=(0.0, 1e-9)).is_uniform


def test_a_rollout_token_costs_about_nine_bytes() -> None:
    """Token id, mask, float32 log-probability: what admission and memory estimates count with."""
    long = make_rollout(
        tokens=tuple([70_000] * 1000),
        loss_mask=[1] * 1000,
        behaviour_logprobs=np.full(1000, -0.5, np.float32),
        version_spans=[VersionSpan(1, 0, 1000)],
    )
    group: Group = msgspec.structs.replace(make_group(rewards=(1.0,)), rollouts=[long])
    assert len(encode(group)) < 10.5 * 1000
