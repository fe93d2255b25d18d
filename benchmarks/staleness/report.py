"""The results of `benchmarks.staleness`, as tables between the marks of docs/staleness.md and as docs/staleness.svg.

A cell without a run is shown as missing; nothing is interpolated.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.demo import ROOT
from benchmarks.staleness.results import Results
from benchmarks.staleness.runs import (
    FIRST_STALENESSES,
    GUARDED,
    LOSSES,
    SCREENED,
    SEEDS,
    SPLIT_STALENESSES,
    SPLITS,
    STALENESSES,
    Run,
    guarded,
)
from headrace.common.config import load_recipe
from headrace.learner.algorithm.guard import GuardState, decide

DOCS = ROOT / "docs"
BEGIN, END = "<!-- measured: python -m benchmarks.staleness report -->", "<!-- end of what is measured -->"
MISSING = "–"
KEPT_AT = (16, 32)


def write_report(results: Results) -> None:
    page = DOCS / "staleness.md"
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    tables = [_screening(results), _study(results), _splits(results), _study(results, is_long=True), _guard(results)]
    joined = "\n\n".join(tables)
    page.write_text(f"{head}{BEGIN}\n\n{joined}\n\n{END}{tail}")
    _plot(results, DOCS / "staleness.svg")


def _screening(results: Results) -> str:
    rows = {loss: results.of(Run(loss, SCREENED, SEEDS[0])) for loss in LOSSES}
    found = {loss: row for loss, row in rows.items() if row}
    ranked = sorted(found, key=lambda loss: sum(found[loss]["accuracy"].values()), reverse=True)
    lines = [
        f"**Screening** at staleness {SCREENED}, one seed. Columns: held-out accuracy by step; the lowest mean reward "
        "of a step after the tenth; a step's highest KL(behaviour ‖ proximal) and lowest effective sample size (ESS); "
        "the step after which the guard would have tightened (it only warned).",
        "",
        "| loss | 20 | 40 | 60 | lowest reward | highest KL | lowest ESS | guard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss in ranked:
        accuracy, columns = found[loss]["accuracy"], found[loss]["columns"]
        rewards, kl, ess = (_known(columns[name]) for name in ("reward_mean", "kl_behaviour_proximal", "ess"))
        cells = [f"{accuracy[step]:.3f}" for step in sorted(accuracy, key=int)]
        cells += [f"{min(rewards[10:]):.2f}", f"{max(kl):.2g}", f"{min(ess):.2f}"]
        cells.append(_first_tightening(Run(loss, SCREENED, SEEDS[0]), columns))
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    missing = [loss for loss in LOSSES if loss not in found]
    return "\n".join([*lines, *([f"\nNot run: {', '.join(missing)}."] if missing else [])])


def _study(results: Results, is_long: bool = False) -> str:
    told = (
        f"**Study{', longer answers' if is_long else ''}**: held-out accuracy after the last step, mean of the seeds "
        "(lowest–highest; number of seeds). Kept: accuracy at staleness 16 and 32 divided by that at 0, for the seed "
        "with the lowest ratio. Lowest: the lowest accuracy of all evaluations during the runs."
    )
    losses = _studied(results, is_long)
    header, rule, *rows = _by_staleness(results, "loss", losses, FIRST_STALENESSES if is_long else STALENESSES, is_long)
    more = [f" {_kept(results, loss, is_long)} | {_lowest(results, loss, is_long):.3f} |" for loss in losses]
    lines = [f"{header} kept | lowest |", f"{rule}---|---|", *(map(str.__add__, rows, more))]
    return "\n".join([told, "", *(lines if losses else ["Not run yet."])])


def _splits(results: Results) -> str:
    told = (
        "**Mini-batches** of whole groups, or with each group's completions dealt out over them "
        "(`actor.mini_batch_split`); uniform groups dropped or kept in the batch (`actor.dynamic_sampling`). Cells as "
        "above."
    )
    return "\n".join([told, "", *_by_staleness(results, "mini-batches", SPLITS, SPLIT_STALENESSES)])


def _by_staleness(
    results: Results, what: str, losses: Iterable[str], levels: Sequence[int], is_long: bool = False
) -> list[str]:
    """Final accuracies, a row per loss and a column per staleness."""
    lines = [
        f"| {what} | {' | '.join(f'staleness {staleness}' for staleness in levels)} |",
        f"|---|{'---|' * len(levels)}",
    ]
    for loss in losses:
        cells = [_cell(list(_finals(results, loss, staleness, is_long).values())) for staleness in levels]
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return lines


def _kept(results: Results, loss: str, is_long: bool) -> str:
    fresh = _finals(results, loss, 0, is_long)
    stale = [_finals(results, loss, staleness, is_long) for staleness in KEPT_AT]
    shares = [[finals[seed] / fresh[seed] for seed in finals if seed in fresh] for finals in stale]
    return ", ".join(f"{min(found):.0%}" if found else MISSING for found in shares)


def _lowest(results: Results, loss: str, is_long: bool) -> float:
    runs = [Run(loss, staleness, seed, is_long) for staleness in STALENESSES for seed in SEEDS]
    return min(float(min(row["accuracy"].values())) for run in runs if (row := results.of(run)))


def _guard(results: Results) -> str:
    lines = [
        "**Guard**: runs that collapse, without and with the guard: on the first task 40 steps at three times the "
        "demo's lr, on the second task 60 steps at the demo's lr. One value per seed. The last column is the number of "
        "levels by which the guard tightened.",
        "",
        "| run | 20 | 40 | 60 | lowest reward | highest KL | levels |",
        "|---|---|---|---|---|---|---|",
    ]
    for of_seeds in zip(*(guarded(seed) for seed in SEEDS), strict=True):
        found = [row for run in of_seeds if (row := results.of(run))]
        columns = [{name: _known(values) for name, values in row["columns"].items()} for row in found]
        cells = [
            " / ".join(f"{row['accuracy'][step]:.3f}" for row in found if step in row["accuracy"])
            for step in ("20", "40", "60")
        ]
        cells.append(" / ".join(f"{min(one['reward_mean'][10:]):.2f}" for one in columns))
        cells.append(" / ".join(f"{max(one['kl_behaviour_proximal']):.2g}" for one in columns))
        cells.append(" / ".join(f"{max(one['guard_notch']):.0f}" for one in columns))
        name = of_seeds[0].name.rpartition(", seed")[0]
        lines.append(f"| {name} | {' | '.join(cell or MISSING for cell in cells)} |")
    return "\n".join([*lines, "", _would_have_tightened(results)])


def _would_have_tightened(results: Results) -> str:
    levels = sorted({*STALENESSES, *SPLIT_STALENESSES})
    runs = [Run(*one) for one in itertools.product(LOSSES | SPLITS, levels, SEEDS, (False, True))]
    known = {run: row["columns"] for run in runs if (row := results.of(run))}
    steps = {run.name: step for run, columns in known.items() if (step := _first_tightening(run, columns)) != MISSING}
    told = "; ".join(f"{name}: after step {step}" for name, step in steps.items())
    count = f"In the {len(known)} runs above the guard only warned. It would have tightened in {len(steps)} of them."
    return f"{count} {told}."


def _first_tightening(run: Run, columns: dict[str, list[float | None]]) -> str:
    """The step at which the guard would have tightened first, if it had been allowed to."""
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", [*run.settings, "actor.divergence_guard=act"]).config
    state = GuardState()
    names = ("kl_behaviour_proximal", "behaviour_clip_fraction", "ess")
    for step, values in enumerate(zip(*(columns[name] for name in names), strict=True), start=1):
        state, kind, _ = decide(state, dict(zip(names, values, strict=True)), config)
        if kind == "tighten":
            return str(step)
    return MISSING


def _studied(results: Results, is_long: bool = False) -> list[str]:
    """Losses that were run at another staleness than the screening's, or on the second task."""
    levels = [staleness for staleness in STALENESSES if is_long or staleness != SCREENED]
    return [loss for loss in LOSSES if any(_finals(results, loss, staleness, is_long) for staleness in levels)]


def _finals(results: Results, loss: str, staleness: int, is_long: bool = False) -> dict[int, float]:
    """The accuracy after the last step, for each seed that was run."""
    rows = {seed: results.of(Run(loss, staleness, seed, is_long)) for seed in SEEDS}
    return {seed: row["accuracy"][str(row["steps"])] for seed, row in rows.items() if row}


def _cell(finals: list[float]) -> str:
    if not finals:
        return MISSING
    if len(finals) == 1:
        return f"{finals[0]:.3f} (1)"
    return f"{statistics.mean(finals):.3f} ({min(finals):.3f}–{max(finals):.3f}; {len(finals)})"


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _plot(results: Results, path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "headrace"
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for loss in _studied(results):
        levels = [staleness for staleness in STALENESSES if _finals(results, loss, staleness)]
        finals = [list(_finals(results, loss, staleness).values()) for staleness in levels]
        means = [statistics.mean(values) for values in finals]
        spread = [
            [mean - min(values) for mean, values in zip(means, finals, strict=True)],
            [max(values) - mean for mean, values in zip(means, finals, strict=True)],
        ]
        places = [STALENESSES.index(staleness) for staleness in levels]
        left.errorbar(places, means, yerr=spread, marker="o", capsize=3, label=loss)
    left.set(xlabel="staleness (steps)", ylabel="held-out accuracy, last step", ylim=(0, 1))
    left.set_xticks(range(len(STALENESSES)), [str(staleness) for staleness in STALENESSES])
    for loss in [*_studied(results), *GUARDED]:
        if row := results.of(Run(loss, SCREENED, SEEDS[0])):
            rewards = _known(row["columns"]["reward_mean"])
            smooth = [statistics.mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
            right.plot(range(1, len(smooth) + 1), smooth, label=loss)
    right.set(xlabel=f"step (staleness {SCREENED}, seed {SEEDS[0]})", ylabel="reward, mean of 5 steps", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    figure.savefig(path, metadata={"Date": None})
