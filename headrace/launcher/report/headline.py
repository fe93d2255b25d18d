"""A report's key figures and settings, from a run's rows and configuration. Pure."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from headrace.common.config import RunConfig
from headrace.common.process.redaction import redact_url_passwords
from headrace.launcher.report.rows import Row, is_number
from headrace.launcher.terminal.render import number


class Setting(NamedTuple):
    name: str
    value: str
    default: Any
    is_default: bool


def settings(config: dict[str, Any]) -> list[Setting]:
    """Every setting with its resolved value, by its dotted name."""
    return list(_settings(config, RunConfig, ""))


def _settings(given: dict[str, Any], section: type[BaseModel] | None, prefix: str) -> Iterator[Setting]:
    for key, value in given.items():
        field = section.model_fields.get(key) if section else None
        inner = field.annotation if field else None
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _settings(value, inner, f"{prefix}{key}.")
            continue
        default = field.get_default(call_default_factory=True) if field else PydanticUndefined
        has_default = default is not PydanticUndefined
        yield Setting(
            f"{prefix}{key}",
            redact_url_passwords(str(value)),
            default if has_default else None,
            has_default and value == default,
        )


def headline(rows: Sequence[Row], num_steps: int | None, summary: Row | None) -> list[tuple[str, str]]:
    """The key figures of the run."""
    steps = [row for row in rows if row.get("kind") == "step"]
    evaluations = [row["held_out"] for row in rows if row.get("kind") == "evaluation" and row.get("held_out")]
    if not steps:
        return [("steps", "none yet")]
    last = steps[-1]
    wall_s = last.get("wall_s") or 0.0
    tokens = last.get("run_generated_tokens") or 0
    pauses_ms = [pause for row in steps for pause in row.get("swap_pauses_ms", [])]
    staleness = [row["staleness_mean"] for row in steps if is_number(row.get("staleness_mean"))]
    found = [("steps", f"{last['step']}" + (f" of {num_steps}" if num_steps else ""))]
    if evaluations:
        found.append(("held-out", f"{evaluations[0]:.3f} → {evaluations[-1]:.3f}"))
    found += [("reward", number(last.get("sampled_reward_mean"), 3)), ("hours", f"{wall_s / 3600:.2f}")]
    found.append(("tokens/s", f"{tokens / wall_s:,.0f}" if wall_s else "–"))
    if staleness:
        found.append(("staleness", f"{statistics.fmean(staleness):.2f}"))
    if pauses_ms:
        found.append(("weight pause", f"{statistics.median(pauses_ms):.0f} ms"))
    if summary is not None and "groups" in summary:
        found.append(("groups trained", f"{summary['groups'].get('trained', 0):,}"))
    return found
