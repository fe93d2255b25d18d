"""The algorithm's settings: advantages, ratios, clips, aggregation; and the presets that set several at once.

Field names are those of the recipe that this project started from (`preset: baseline`). The defaults are the variant
that keeps learning on stale data: decoupled loss, a gradient per token, and the behaviour clip.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from headrace.common.config.section import Section

PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {
        "group_size": 4,
        "importance_sampling_level": "sequence",
        "ratio_gradient": "sequence",
        "use_decoupled_loss": True,
        "behav_imp_weight_mode": "token_mask",
        "behav_imp_weight_cap": 5.0,
        "behaviour_clip": False,
        "eps_clip": 0.4,
        "eps_clip_higher": None,
        "loss_aggregation": "token_mean",
        "num_mini_batches": 1,
        "reward_bias": -0.5,
        "reward_scaling": 10.0,
        "advantage_mean": "group",
        "advantage_std": "group",
        "batch_advantage_norm": True,
        "divergence_guard": "warn",
    },
    "paper": {
        "importance_sampling_level": "sequence",
        "ratio_gradient": "sequence",
        "use_decoupled_loss": True,
        "behav_imp_weight_mode": "sequence_truncate",
        "behav_imp_weight_cap": 5.0,
        "behaviour_clip": False,
        "eps_clip": 3e-4,
        "eps_clip_higher": 4e-4,
        "loss_aggregation": "sequence_mean",
        "num_mini_batches": 4,
    },
    "token": {"importance_sampling_level": "token"},
}


class ActorConfig(Section):
    """How rewards become advantages and advantages a loss. Equations: docs/algorithm.md."""

    preset: Literal["baseline", "paper", "token"] | None = Field(
        None, description="Named set of values for the fields below; a field given beside it takes precedence."
    )

    group_size: int = Field(8, ge=1, description="Completions per prompt.")
    dynamic_sampling: bool = Field(
        True, description="Replacement of groups whose raw rewards are all equal, so that the batch size is constant."
    )

    reward_bias: float = Field(0.0, description="Number added to the raw reward.")
    reward_scaling: float = Field(1.0, gt=0, description="Factor applied to the reward after reward_bias.")
    reward_clip: float = Field(
        20.0, gt=0, description="Largest absolute value of the scaled reward; beyond it the reward is clipped."
    )
    advantage_mean: Literal["group", "leave_one_out", "batch", "none"] = Field(
        "group",
        description="Mean that is subtracted from a reward: of its group, of the others in the group, or of the batch.",
    )
    advantage_std: Literal["group", "batch", "none"] = Field(
        "group",
        description="Unbiased standard deviation by which the difference is divided: of the group or the batch.",
    )
    batch_advantage_norm: bool = Field(
        False, description="Second normalisation of advantages, over all loss tokens of the batch."
    )
    truncated: Literal["train", "mask"] = Field(
        "train",
        description="Treatment of completions that reached max_new_tokens, and of episodes that reached a limit. "
        "train: like any other, with their reward. mask: as if they had not been sampled; they count neither in the "
        "loss nor in their group's mean, deviation and uniformity.",
    )
    overlong_tokens: int = Field(
        0,
        ge=0,
        description="Width in tokens of the range below max_new_tokens, or of an episode below environment.max_tokens, "
        "where length is penalised (DAPO); 0: none.",
    )
    overlong_penalty_factor: float = Field(
        1.0,
        ge=0,
        description="Penalty at the upper end of that range; shorter completions in it get less, linearly.",
    )

    importance_sampling_level: Literal["sequence", "token"] = Field(
        "sequence", description="Importance ratio per sequence (GSPO) or per token (PPO, GRPO)."
    )
    ratio_gradient: Literal["sequence", "token"] = Field(
        "token",
        description="Gradient at sequence level: one for all tokens of a sequence, or one per token with the same "
        "ratio value (GSPO-token). No effect at token level.",
    )
    eps_clip: float = Field(0.067, gt=0, lt=1, description="Lower clip width: ratios below 1 - eps_clip are clipped.")
    eps_clip_higher: float | None = Field(
        0.093, gt=0, description="Upper clip width: ratios above 1 + eps_clip_higher are clipped; null: eps_clip."
    )
    trust_region: Literal["clip", "soft", "second_moment"] = Field(
        "clip",
        description="Bound on the ratio. clip: clipped to the range above, where that makes the objective worse (PPO). "
        "soft: a sigmoid gate instead (SAPO). second_moment: in each sequence, the tokens that have moved furthest in "
        "the direction of their advantage are masked, until the mean squared log-ratio of the others is at most 0.04 "
        "(M2PO).",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Bound on the loss where the advantage is negative (dual clip); default: none. Only for "
        "trust_region clip.",
    )

    use_decoupled_loss: bool = Field(
        True, description="Ratio to the proximal policy, weighted by proximal/behaviour; if false, ratio to behaviour."
    )
    behav_imp_weight_mode: Literal[
        "token_mask", "token_truncate", "token_band", "sequence_mask", "sequence_truncate", "disabled"
    ] = Field(
        "token_mask",
        description="Level of the behaviour weight, and treatment of weights above the cap: masked or truncated. "
        "token_band: masked above the cap and below 0.5 (IcePop).",
    )
    behav_imp_weight_cap: float = Field(5.0, gt=0, description="Cap of the behaviour weight.")
    behaviour_clip: bool = Field(
        True,
        description="Removal of sequences that have already moved from the behaviour policy beyond the clip range, in "
        "the direction of their advantage.",
    )

    loss_aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "sequence_mean", description="Mean over all loss tokens, or mean over sequences of their token means."
    )
    num_mini_batches: int = Field(
        4,
        ge=1,
        description="Number of optimizer updates per step. With 1 and the decoupled loss, the policy equals the "
        "proximal policy at the only update: the ratio is 1 and the clip never acts.",
    )
    mini_batch_split: Literal["groups", "completions"] = Field(
        "groups",
        description="Unit of the split into mini-batches: whole groups, or the completions of each group evenly. With "
        "completions every update sees every prompt, and a prompt is computed in every mini-batch.",
    )
    divergence_guard: Literal["act", "warn"] = Field(
        "act",
        description="Reaction when policy and behaviour drift far apart (KL, effective sample size). warn: log an "
        "event. act: also lower max_staleness, then lr, until the drift is over. Where engine and learner disagree on "
        "the same weights, both only warn.",
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL to the reference policy (the initial policy); 0: no KL term."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of that KL.")

    @property
    def clip_range(self) -> tuple[float, float]:
        """The lowest and the highest ratio that is not clipped."""
        higher = self.eps_clip if self.eps_clip_higher is None else self.eps_clip_higher
        return 1.0 - self.eps_clip, 1.0 + higher

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") not in PRESETS:
            return given
        return PRESETS[given["preset"]] | given

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.group_size == 1 and ("group" in (self.advantage_mean, self.advantage_std)):
            raise ValueError(
                "group_size 1 has no group mean or deviation: set advantage_mean and advantage_std to 'batch' or 'none'"
            )
        if self.group_size == 1 and self.advantage_mean == "leave_one_out":
            raise ValueError("group_size 1 leaves no other completion for advantage_mean 'leave_one_out'")
        if self.group_size == 1 and self.dynamic_sampling:
            raise ValueError("group_size 1 makes every group uniform: set dynamic_sampling to false")
        return self
