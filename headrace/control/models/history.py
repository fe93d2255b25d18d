"""The bodies of `/history`, `/evaluations` and `/events/recent`."""

from typing import Any

from pydantic import Field

from headrace.control.models.bodies import ResponseBody


class Evaluation(ResponseBody):
    step: int
    held_out: float = Field(description="pass@1: mean reward over all completions.")
    pass_at: dict[str, float] = Field({}, description="pass@k by k.", examples=[{"1": 0.81, "2": 0.9}])
    num_completions: int
    num_dead: int = Field(description="Prompts without an answer, because their ticket became a dead letter.")
    first_token_step_mean: float = Field(description="Mean step of the weights that sampled the first tokens.")
    weight_version: int | None = Field(None, description="The weight version that was to be evaluated.")
    is_best: bool = False
    at: float


class History(ResponseBody):
    """Steps as columns of equal length, and evaluations; thinned evenly to at most `max_points` steps."""

    cursor: str = Field(description="Pass it as `after` to read only the rows that came since.")
    steps: dict[str, list[float | None]] = Field(
        description="By name: step, at, wall_s, sampled_reward_mean, staleness_*, kl_behaviour_proximal, ess, …",
    )
    evaluations: list[Evaluation]
    num_steps: int = Field(description="Before thinning.")


class Event(ResponseBody):
    """One event; its `kind` determines the fields of `data`."""

    id: str
    at: float
    kind: str = Field(
        examples=["weight_swap", "evaluation", "settings_requested", "settings_applied", "command", "guard"]
    )
    text: str = Field(description="One line for people.")
    data: dict[str, Any]


class Events(ResponseBody):
    """The newest first."""

    events: list[Event]
