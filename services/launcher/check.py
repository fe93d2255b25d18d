"""`headrace check`: says whether a recipe is right, what it comes to, and what it will need; starts nothing.

Guarantees: every setting stands on one line of its own with its value and source, under its full name, also in a
pipe. What only this machine lacks (SGLang, a free port, a way to the hub) is a note; what is wrong is raised.
"""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from common.config import Recipe, RunConfig
from common.device import CPU_MAX_TOTAL_TOKENS, resolve_device
from common.passwords import without_password
from common.preflight import NotHere, check_run, model_files, read_model_file
from services.launcher.devices import plan_lines
from services.launcher.estimate import Rows, Shape, engine_bytes, learner_bytes, moved_bytes, read_shape
from services.launcher.trial import notes_of, try_task

VALUE_WIDTH = 36
"""Longer values push their source to the right."""
KIB = 1024


def check_recipe(recipe: Recipe, console: Console, as_json: bool) -> None:
    """Prints the settings, notes and estimates. Raises `ValueError` with one line if the recipe cannot run anywhere."""
    missing: list[str] = []
    check_run(recipe.config, missing)
    _try(recipe.config, missing)
    devices = plan_lines(recipe.config, missing)
    if as_json:
        print(json.dumps(_as_json(recipe, missing) | {"devices": devices}, indent=2, ensure_ascii=False))
        return
    _print(console, settings_lines(recipe))
    lines, reason = _estimates(recipe.config)
    for note in missing:
        why = "; its shape is unknown, so that estimates are left out" if note == reason else ""
        _print(console, [f"note: {note}{why}"])
    if reason and reason not in missing:
        _print(console, [f"note: no estimates: {reason}"])
    _print(console, [f"{'' if index else 'devices':8}  {line}" for index, line in enumerate(devices)])
    _print(console, lines)


def _try(config: RunConfig, notes: list[str]) -> None:
    """The prompts and the reward; without the model, the task alone."""
    try:
        model_files(config.model.path, config.model.revision)
        is_model_here = True
    except NotHere:
        is_model_here = False
    try:
        notes += notes_of(try_task(config, is_model_here), config)
    except NotHere as problem:
        notes.append(str(problem))


def _as_json(recipe: Recipe, missing: list[str]) -> dict[str, Any]:
    """`estimates`: bytes by title and by what; null where the model's shape is unknown."""
    shown: dict[str, Any] = {"settings": {}, "notes": missing, "estimates": None}
    for name, source in recipe.sources.items():
        value = json.loads(without_password(json.dumps(_value(recipe.config, name))))
        shown["settings"][name] = {"value": value, "source": without_password(source)}
    try:
        shape = _shape(recipe.config)
    except ValueError as reason:
        return shown | {"notes": list(dict.fromkeys([*missing, str(reason)]))}
    return shown | {"estimates": {"parameters": shape.num_parameters, **_tables(shape, recipe.config)}}


def settings_lines(recipe: Recipe) -> Iterator[str]:
    """`key value source` of every setting, an empty line after each section."""
    names = list(recipe.sources)
    width = max(len(name) for name in names)
    sections: dict[str, list[str]] = {}
    for name in names:
        sections.setdefault(name.rpartition(".")[0].partition(".")[0], []).append(name)
    for section in sections.values():
        for name in section:
            value = without_password(_shown(_value(recipe.config, name)))
            yield f"{name:{width}}  {value:{VALUE_WIDTH}}  {without_password(recipe.sources[name])}"
        yield ""


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def _estimates(config: RunConfig) -> tuple[list[str], str]:
    """The lines of the estimates; or no lines, and why."""
    try:
        shape = _shape(config)
    except ValueError as reason:
        return [], str(reason)
    return list(_estimate_lines(shape, config)), ""


def _shape(config: RunConfig) -> Shape:
    folder = model_files(config.model.path, config.model.revision)
    return read_shape(read_model_file(config.model.path, folder / "config.json"))


def _tables(shape: Shape, config: RunConfig) -> dict[str, Rows]:
    return {
        "learner": learner_bytes(shape, config),
        "engine": engine_bytes(shape, config, _max_total_tokens(config)),
        "moved": moved_bytes(shape, config),
    }


def _estimate_lines(shape: Shape, config: RunConfig) -> Iterator[str]:
    yield f"estimates, for {shape.num_parameters:,} parameters"
    totals = {"learner": "together", "engine": "together, per replica", "moved": None}
    for title, rows in _tables(shape, config).items():
        yield from _table(title, rows, totals[title])


def _max_total_tokens(config: RunConfig) -> int | None:
    on_cpu = resolve_device(config.generation.engine.device) == "cpu"
    return config.generation.engine.max_total_tokens or (CPU_MAX_TOTAL_TOKENS if on_cpu else None)


def _table(title: str, rows: Rows, total: str | None) -> Iterator[str]:
    shown = rows if total is None else rows | {total: sum(rows.values())}
    for index, (what, num_bytes) in enumerate(shown.items()):
        yield f"{title if index == 0 else '':8}  {readable(num_bytes):>10}  {what}"


def readable(num_bytes: int) -> str:
    """Such as 2.9 GiB."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < KIB:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= KIB
    return f"{amount:.1f} TiB"


def _print(console: Console, lines: Any) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)
