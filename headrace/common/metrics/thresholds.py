"""Thresholds of a step's metrics, for medians over the last steps, so that one odd batch raises no alarm."""

from typing import NamedTuple

SMOOTHED_STEPS = 5


class Threshold(NamedTuple):
    name: str
    warn: float
    alarm: float
    text: str
    advice: str
    is_floor: bool = False
    """Whether low values are bad."""

    def is_beyond(self, value: float, limit: float) -> bool:
        """Whether the value is on the bad side of `limit` (`warn` or `alarm`); NaN is."""
        return not (value >= limit if self.is_floor else value <= limit)


OFF_POLICY = "lower optimizer.lr or learner.max_staleness"
THRESHOLDS = (
    Threshold("kl_behaviour_proximal", 0.05, 0.2, "the policy is far from the one that sampled", OFF_POLICY),
    Threshold("ess", 0.5, 0.2, "few tokens carry the batch: the effective sample size is low", OFF_POLICY, True),
    Threshold("clip_fraction", 0.5, 0.8, "most tokens are clipped", "lower optimizer.lr, or widen actor.eps_clip"),
    Threshold(
        "dropped_length_bias",
        0.05,
        0.2,
        "dropped are the long ones: what is trained is shorter than what was sampled",
        "learner.stale_policy train, a higher learner.max_staleness, or a lower learner.max_mean_staleness",
    ),
)
EPISODE_THRESHOLDS = (
    Threshold(
        "episodes_failed_share",
        0.05,
        0.25,
        "episodes fail",
        "see the replicas' logs for the reasons; a failed episode is begun again and never trained",
    ),
    Threshold(
        "rewritten_share",
        0.1,
        1.0,
        "the agent rewrites its history, so that the same tokens are computed in several segments",
        "let it append to the conversation",
    ),
)
"""Of steps that have episodes."""
TRAINED_KL = Threshold("trained_kl", 0.05, 0.1, "what is trained is far from the policy that sampled it", OFF_POLICY)
"""The guard's threshold for KL(behaviour ‖ proximal) times the share of tokens that the behaviour clip leaves to train.
Its alarm is lower than the verdict's for `kl_behaviour_proximal`: in the runs of docs/staleness.md that collapse, an
alarm at 0.1 was early enough to recover them."""
NUMERICS = "compare the engine's numerics with the learner's: dtype, kernels, sampling settings"


def has_exact_numerics(dtype: str | None, swap_mode: str | None) -> bool:
    """Whether engine and learner should agree up to float32 rounding.

    With swap_mode in_place they do not, because KV that is kept over a swap is of earlier weights.
    """
    return dtype == "float32" and swap_mode != "in_place"


def logprob_gap_threshold(is_exact: bool) -> Threshold:
    """The threshold for the root mean square difference of engine's and learner's log-probabilities of fresh tokens.

    Single tokens may differ much. A bfloat16 model has 0.02 to 0.04 per token, depending on whether both sides have
    float32 logits (Qwen2.5-0.5B and 7B, three engines: ServiceNow/Fast-LLM#525); float32 has about 1e-5. An RMS of σ
    from numerics alone is a KL of σ²/2; at the alarm that equals the guard's warning.
    """
    warn, alarm = (1e-3, 1e-2) if is_exact else (0.1, 0.3)
    text = "engine and learner disagree on fresh tokens' log-probabilities"
    return Threshold("fresh_logprob_gap_rms", warn, alarm, text, NUMERICS)
