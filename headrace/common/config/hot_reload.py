"""The settings that can change while a run is live; a change applies from the learner's next step."""

from collections.abc import Mapping

from pydantic import ValidationError

from headrace.common.config.recipe import describe_problem
from headrace.common.config.run import RunConfig

HOT_RELOADABLE = (
    "optimizer.lr",
    "learner.max_staleness",
    "learner.max_mean_staleness",
    "sampling.temperature",
    "actor.eps_clip",
    "actor.eps_clip_higher",
    "evaluation.interval_steps",
)


def with_settings(config: RunConfig, values: Mapping[str, int | float | None]) -> RunConfig:
    """The configuration with `values`, keyed by dotted name, validated again.

    Raises `ValueError` naming the setting, the value and what was expected.
    """
    settings = config.model_dump()
    for name, value in values.items():
        if name not in HOT_RELOADABLE:
            raise ValueError(
                f"{name[:60]} cannot change while the run is live: expected one of {', '.join(HOT_RELOADABLE)}"
            )
        section, field = name.split(".")
        settings[section][field] = value
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ValueError("; ".join(map(describe_problem, error.errors()))) from error


def hot_reloadable_values(config: RunConfig) -> dict[str, int | float | None]:
    """The current value of each hot-reloadable setting, by dotted name."""
    settings = config.model_dump()
    return {name: settings[name.split(".")[0]][name.split(".")[1]] for name in HOT_RELOADABLE}
