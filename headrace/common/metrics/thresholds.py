"""What numbers of a step are well: thresholds of medians over the last steps, so that one odd batch raises no alarm."""

from typing import NamedTuple

SMOOTHED_STEPS = 5


class Threshold(NamedTuple):
    name: str
    warn: float
    alarm: float
    text: str
    advice: str
    is_floor: bool = False
    """Low is bad."""

    def is_beyond(self, value: float, limit: float) -> bool:
        """On the bad side of `warn` or `alarm`; NaN is beyond both."""
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
TRAINED_KL = Threshold("trained_kl", 0.05, 0.1, "what is trained is far from the policy that sampled it", OFF_POLICY)
"""The guard's own, of KL(behaviour ‖ proximal) times the share of tokens that the behaviour clip leaves to be trained.
Its alarm is lower than the verdict's on `kl_behaviour_proximal`: in the runs of docs/staleness.md that collapse, 0.1
came early enough to bring them back."""
NUMERICS = "compare the engine's numerics with the learner's: dtype, kernels, sampling settings"


def has_exact_numerics(dtype: str | None, swap_mode: str | None) -> bool:
    """Whether engine and learner should agree but for float32's rounding; KV that is kept over a swap is of earlier
    weights."""
    return dtype == "float32" and swap_mode != "in_place"


def logprob_gap_threshold(is_exact: bool) -> Threshold:
    """Of what engine and learner say of tokens of the same weights, by root mean square: single tokens may be far off.

    A bfloat16 model is at 0.02 to 0.04 per token, by whether both sides have float32 logits (Qwen2.5-0.5B and 7B, three
    engines: ServiceNow/Fast-LLM#525). Numerics alone of RMS σ make a KL of σ²/2: at the alarm as much as the guard
    warns of. In float32 it is about 1e-5.
    """
    warn, alarm = (1e-3, 1e-2) if is_exact else (0.1, 0.3)
    text = "engine and learner disagree on fresh tokens' log-probabilities"
    return Threshold("fresh_logprob_gap_rms", warn, alarm, text, NUMERICS)
