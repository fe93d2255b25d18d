"""Estimated traffic of a run: a weight version's bytes to the replicas, and a step's groups through Redis."""

import math

import numpy as np

from headrace.common.config import RunConfig
from headrace.common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode
from headrace.launcher.estimates.device_memory import BYTES, TYPICAL_PROMPT_TOKENS, Rows
from headrace.launcher.estimates.model_size import Shape

CHARS_PER_TOKEN = 4
TYPICAL_WEIGHT = 0.04
"""Assumed standard deviation of weights."""
UPDATE_SHARE = 0.05
"""How far AdamW moves a weight at one update, as a share of lr. Calibrated on SmolLM2-135M's deltas
(tests/launcher/test_estimates.py)."""
MANTISSA_BITS = {"float32": 23, "bfloat16": 7}
CODING = 1.15
"""Ratio of the bytes sent to the entropy of the differences."""
QUANTILES = 999


def traffic_bytes(shape: Shape, config: RunConfig) -> Rows:
    """Bytes per version to a replica on another machine, to a joining replica, and per step through Redis.

    A version is sent as a delta; a replica that joins or is far behind fetches all weights. On the learner's machine no
    bytes are sent. A step's groups are encoded, with every completion at full length.
    """
    whole = shape.num_parameters * BYTES[config.model.dtype]
    share = delta_share(config)
    group = full_length_group(config, shape.vocab)
    groups = config.learner.groups_per_step
    num_tokens = config.actor.group_size * config.sampling.max_new_tokens
    per_group = len(encode(group))
    per_step = groups * (per_group + len(encode(group.ticket)))
    what = f"per version, to a replica elsewhere: about {share:.1%} of the weights' bytes at lr {config.optimizer.lr:g}"
    return {
        what: int(whole * share),
        "to a replica that joins": whole,
        f"per step through Redis, at most ({groups} groups, {per_group / num_tokens:.1f} bytes a token)": per_step,
    }


def delta_share(config: RunConfig) -> float:
    """Estimated size of a delta as a share of the model's bytes; an error of a factor of two is usual.

    A step moves a weight by `lr * num_mini_batches * UPDATE_SHARE`, which is d units in its last place, averaged over
    weights of the usual size. With d < 1 the weight changes with probability d, which costs the entropy of that event
    and a sign; with d above 1 its last log2(d) bits change.
    """
    bits = MANTISSA_BITS[config.model.dtype]
    probabilities = (np.arange(QUANTILES) + 0.5) / (2 * QUANTILES) + 0.5
    weights = TYPICAL_WEIGHT * np.array([_normal_quantile(p) for p in probabilities])
    units = 2.0 ** (np.floor(np.log2(weights)) - bits)
    moved = config.optimizer.lr * config.actor.num_mini_batches * UPDATE_SHARE / units
    changed = float(np.minimum(moved, 1).mean())
    rest = 1 - changed
    entropy = -sum(part * math.log2(part) for part in (changed, rest) if part > 0)
    low_bits = float(np.log2(np.maximum(moved, 1)).mean())
    sent_bits = (entropy + changed + low_bits) * CODING
    return min(1.0, sent_bits / (8 * BYTES[config.model.dtype]))


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def full_length_group(config: RunConfig, vocab: int) -> Group:
    """A group whose completions all reach max_new_tokens, with ids from all over the vocabulary."""
    length, count = config.sampling.max_new_tokens, config.actor.group_size
    ticket = Ticket(
        id="0-0",
        kind="train",
        prompt_tokens=np.linspace(0, vocab - 1, TYPICAL_PROMPT_TOKENS, dtype=int).tolist(),
        messages=[{"role": "user", "content": "x" * (TYPICAL_PROMPT_TOKENS * CHARS_PER_TOKEN)}],
        reference={"answer": "0"},
        num_completions=count,
        sampling=Sampling(config.sampling.temperature, length, [0]),
        min_weight_version=1,
    )
    rollout = Rollout.of_completion(
        tokens=np.linspace(0, vocab - 1, length, dtype=np.int32),
        behaviour_logprobs=np.full(length, -1.0, np.float32),
        version_spans=[VersionSpan(1, 0, length)],
        reward=1.0,
        finish_reason="length",
        text="x" * (length * CHARS_PER_TOKEN),
    )
    return Group(ticket=ticket, rollouts=[rollout] * count, replica="generation-0", timings=Timings(0.0, 0.0, 0.0))
