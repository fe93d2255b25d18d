"""Metrics of a training step that show whether asynchronous learning is healthy: pure functions.

To add a metric, add a key to one of these dictionaries. A new key of a row travels by itself to Redis, `/history`, the
trackers and Prometheus, if its value is a single number and its name is lower-case letters, digits and `_` (at most
64); names of a task's own metrics are `environment/` and any ASCII. A list goes to the event and `metrics.jsonl` alone,
unless `StepTotals` puts it into a histogram (`group_durations_s`). The key's help text in Prometheus is its line in
`TEXTS` of `headrace/common/metrics/steps.py`. The page draws it once it is a series in
`headrace/control/page/chart_specs.js`. `/history` keeps at most 200 columns.

Off-policy metrics compare behaviour with proximal log-probabilities token by token, over the whole batch and by token
staleness. A fresh token was sampled with the same weights that compute its proximal log-probability, so its gap is due
to numerics alone, engine against learner. The gap of a stale token is due to numerics and to the policy's drift.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headrace.common.wire import Group
from headrace.learner.algorithm.loss import PolicyLoss
from headrace.learner.algorithm.staleness import Staleness
from headrace.learner.model.packing import MicroBatch

MAX_COUNTED_GAP = 3.0
"""Upper bound, in nats, of a token's p - b in `ess` and `kl_*`. Without it exp(p - b) of a single token, caused by
bfloat16 or by a router that chose another expert, could dominate them. One token in a thousand at this bound gives an
`ess` of 0.75 and a KL of 0.016, which raise no alarm. The losses mask or truncate weights far below it."""


def combine_losses(results: Sequence[PolicyLoss]) -> dict[str, float]:
    """The step's metrics from those of its micro-batches: the maximum for `_max`, else the mean weighted by tokens;
    empty without micro-batches."""
    if not results:
        return {}
    total = sum(result.num_tokens for result in results)
    combined = {"loss": sum(r.loss.item() * r.weight for r in results) / sum(r.weight for r in results)}
    for name in results[0].metrics:
        values = [result.metrics[name] for result in results]
        if name.endswith("_max"):
            combined[name] = max(values)
        else:
            combined[name] = sum(v * r.num_tokens for v, r in zip(values, results, strict=True)) / total
    return combined


def off_policy_metrics(micro_batches: Sequence[MicroBatch], proximal_logprobs: Sequence[Tensor]) -> dict[str, float]:
    """`ess`: effective sample size of the uncapped behaviour weights as a share of the tokens, in (0, 1].

    `kl_*`: KL(behaviour ‖ proximal) by the estimator exp(p - b) - 1 - (p - b), overall and for each staleness. Both
    bound p - b by `MAX_COUNTED_GAP`. Empty if no token is trained.
    """
    if not micro_batches:
        return {}
    behaviour = torch.cat([torch.from_numpy(m.behaviour_logprobs.copy()) for m in micro_batches]).double()
    staleness = torch.cat([torch.from_numpy(m.token_staleness) for m in micro_batches])
    gap = torch.cat([p.detach().cpu() for p in proximal_logprobs]).double() - behaviour
    counted = gap.clamp(max=MAX_COUNTED_GAP)
    weight = counted.exp()
    kl = weight - 1 - counted
    found = {
        "ess": (weight.sum() ** 2 / (len(weight) * (weight**2).sum())).item(),
        "kl_behaviour_proximal": kl.mean().item(),
        "token_staleness_mean": staleness.double().mean().item(),
    }
    for level in staleness.unique().tolist():
        found[f"kl_at_staleness_{level}"] = kl[staleness == level].mean().item()
    return found


def logprob_gaps(
    micro_batches: Sequence[MicroBatch],
    proximal_logprobs: Sequence[Tensor],
    probed: tuple[MicroBatch, Tensor] | None = None,
) -> dict[str, float]:
    """`fresh_logprob_gap_*`: mean, root mean square and 99.9th percentile of |p - b| over the `fresh_tokens` of the
    batch or, if given, of `probed`. `stale_logprob_gap_rms`: the same over the batch's other tokens. Gaps that have no
    tokens are left out."""
    batch = [_gap(one, logprobs) for one, logprobs in zip(micro_batches, proximal_logprobs, strict=True)]
    scored = batch if probed is None else [_gap(*probed)]
    fresh = np.concatenate([gap[staleness == 0] for gap, staleness in scored] or [np.zeros(0)])
    stale = np.concatenate([gap[staleness > 0] for gap, staleness in batch] or [np.zeros(0)])
    found = {"fresh_tokens": float(len(fresh))}
    if len(fresh):
        found |= {
            "fresh_logprob_gap_mean": float(np.abs(fresh).mean()),
            "fresh_logprob_gap_rms": _rms(fresh),
            "fresh_logprob_gap_p999": float(np.quantile(np.abs(fresh), 0.999)),
        }
    if len(stale):
        found["stale_logprob_gap_rms"] = _rms(stale)
    return found


def _gap(micro_batch: MicroBatch, logprobs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    gap = logprobs.detach().cpu().double().numpy() - micro_batch.behaviour_logprobs
    return gap, micro_batch.token_staleness


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def group_metrics(groups: Sequence[Group], truncated: Literal["train", "mask"] = "train") -> dict[str, float]:
    """Metrics of all completions; `batch_tokens` counts only those that `actor.truncated` leaves to be trained."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [rollout.num_trained_tokens for rollout in rollouts]
    timings = [group.timings for group in groups]
    versions = [{span.version for span in rollout.version_spans} for rollout in rollouts]
    return {
        "trained_reward_mean": sum(rollout.reward for rollout in rollouts) / len(rollouts),
        "completion_tokens_mean": sum(lengths) / len(rollouts),
        "completion_tokens_max": float(max(lengths)),
        "truncated_share": sum(rollout.is_truncated for rollout in rollouts) / len(rollouts),
        "batch_tokens": float(
            sum(one.num_trained_tokens for group in groups for one in group.trainable_rollouts(truncated))
        ),
        "multi_version_share": sum(len(several) > 1 for several in versions) / len(rollouts),
        "num_versions": float(len(set().union(*versions))),
        "sampling_s_mean": sum(timing.sampled_s - timing.leased_s for timing in timings) / len(groups),
        "scoring_s_mean": sum(timing.scored_s - timing.sampled_s for timing in timings) / len(groups),
    }


def group_durations_s(groups: Sequence[Group]) -> list[float]:
    """Seconds from each group's lease until it was scored."""
    return [round(group.timings.scored_s - group.timings.leased_s, 4) for group in groups]


def staleness_metrics(levels: Sequence[Staleness]) -> dict[str, float]:
    count = len(levels)
    return {
        "staleness_mean": sum(level.total for level in levels) / count,
        "staleness_max": float(max(level.total for level in levels)),
        "staleness_in_flight_mean": sum(level.in_flight for level in levels) / count,
        "staleness_in_queue_mean": sum(level.in_queue for level in levels) / count,
    }


def padding_share(micro_batches: Sequence[MicroBatch]) -> float:
    """The share of padding in the rows that attention computes; nothing else is padded."""
    widths = [
        [len(prompt) + len(segment) for prompt, segment in one.layout.spans] for m in micro_batches for one in m.passes
    ]
    return 1 - sum(map(sum, widths)) / sum(len(part) * max(part) for part in widths) if widths else 0.0
