"""The steps of a run as a table, or as lines without a terminal."""

from collections.abc import Callable, Sequence

import msgspec
from rich.table import Table

MAX_ROWS = 12


class StepEvent(msgspec.Struct):
    """The fields of a step's row that are shown; a float is null where it is not finite."""

    step: int
    run_generated_tokens: int
    sampled_reward_mean: float | None
    staleness_mean: float | None
    run_uniform_share: float | None
    wall_s: float | None
    wait_s: float | None
    step_s: float | None
    kl_behaviour_proximal: float | None


class EvaluationEvent(msgspec.Struct):
    step: int
    held_out: float
    num_completions: int


def step_line(event: StepEvent, num_steps: int) -> str:
    """A line such as `step 3, reward 0.412, … (of 60 steps)`."""
    cells = ", ".join(f"{name} {_cell(value, event)}" for name, value in COLUMNS.items())
    return f"{cells} (of {num_steps} steps)"


def step_table(steps: Sequence[StepEvent], evaluations: Sequence[EvaluationEvent]) -> Table:
    """The latest steps, each with the held-out accuracy after it."""
    table = Table(title=None)
    for name in (*COLUMNS, "held-out"):
        table.add_column(name, justify="right")
    held_out = {event.step: f"{event.held_out:.3f}" for event in evaluations}
    for event in steps[-MAX_ROWS:]:
        table.add_row(*(_cell(value, event) for value in COLUMNS.values()), held_out.get(event.step, ""))
    return table


def _cell(value: Callable[[StepEvent], str], event: StepEvent) -> str:
    try:
        return value(event)
    except TypeError:  # a null
        return "–"


COLUMNS: dict[str, Callable[[StepEvent], str]] = {
    "step": lambda e: str(e.step),
    "reward": lambda e: f"{e.sampled_reward_mean:.3f}",
    "staleness": lambda e: f"{e.staleness_mean:.2f}",
    "uniform": lambda e: f"{e.run_uniform_share:.0%}",
    "tokens/s": lambda e: f"{e.run_generated_tokens / max(e.wall_s or 0, 1e-9):.0f}",
    "waited": lambda e: f"{e.wait_s:.2f} s",
    "step time": lambda e: f"{e.step_s:.2f} s",
    "KL": lambda e: f"{e.kl_behaviour_proximal:.4f}",
}
