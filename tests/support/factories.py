"""Tickets and groups for tests, valid unless told otherwise."""

from typing import Any

import msgspec
import numpy as np

from headrace.common.wire import Group, Rollout, Sampling, Segment, Ticket, Timings, VersionSpan

SAMPLING = Sampling(temperature=1.0, max_new_tokens=16, stop_token_ids=[1])


def make_ticket(name: str = "0-0", **changes: Any) -> Ticket:
    ticket = Ticket(
        id=name,
        kind="train",
        prompt_tokens=[5, 6, 7],
        messages=[{"role": "user", "content": "1 + 1?"}],
        reference={"answer": "2"},
        num_completions=2,
        sampling=SAMPLING,
        min_weight_version=1,
    )
    return msgspec.structs.replace(ticket, **changes)


def make_segment(tokens: tuple[int, ...] | np.ndarray = (8, 9, 1), version: int = 1, **changes: Any) -> Segment:
    segment = Segment(
        tokens=tokens if isinstance(tokens, np.ndarray) else np.array(tokens, np.int32),
        loss_mask=b"\1" * len(tokens),
        behaviour_logprobs=np.full(len(tokens), -0.5, np.float32),
        version_spans=[VersionSpan(version, 0, len(tokens))],
    )
    return msgspec.structs.replace(segment, **changes)


def make_rollout(
    reward: float = 1.0, tokens: tuple[int, ...] | np.ndarray = (8, 9, 1), version: int = 1, **changes: Any
) -> Rollout:
    """`changes`: of the rollout's fields, and of those of its only segment."""
    of_segment = {name: changes.pop(name) for name in Segment.__struct_fields__ if name in changes}
    rollout = Rollout([make_segment(tokens, version, **of_segment)], reward, "stop", text="2")
    return msgspec.structs.replace(rollout, **changes)


def make_group(name: str = "0-0", rewards: tuple[float, ...] = (1.0, 0.0), version: int = 1, **changes: Any) -> Group:
    ticket = make_ticket(name, num_completions=len(rewards), **changes)
    rollouts = [make_rollout(reward, version=version) for reward in rewards]
    return Group(ticket, rollouts, replica="r", timings=Timings(1.0, 2.0, 3.0))
