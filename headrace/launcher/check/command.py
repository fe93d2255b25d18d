"""`headrace check`: validates a recipe, prints its settings, and estimates what it needs. Nothing keeps running.

Every setting is on one line of its own with its full name, value and source, also in a pipe. What only this machine
lacks (SGLang, a free port, access to the hub, memory) is a note. A mistake in the recipe is an error.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from headrace.common.config import Recipe, RunConfig
from headrace.common.preflight.installation import check_installed
from headrace.common.preflight.recipe import UnavailableHere, check_run, model_files
from headrace.common.process.redaction import redact_url_passwords
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.check.prompt_trial import TaskTrial
from headrace.launcher.check.sections import SECTIONS, Section
from headrace.launcher.check.trial import trial_notes, try_task
from headrace.launcher.estimates.model_size import Shape, shape_of

VALUE_WIDTH = 36
"""A longer value moves its source to the right."""


def check_recipe(recipe: Recipe, console: Console, as_json: bool) -> None:
    """Prints the settings, notes and estimates. Raises `ValueError` with one line if the recipe cannot run anywhere."""
    config = recipe.config
    check_installed()
    notes: list[str] = []
    check_run(config, notes)
    shape, problem = _shape(config)
    found = _try(config, notes)
    if problem:
        suffix = "; its shape is unknown, so there are no estimates"
        notes = [f"{note}{suffix}" if note == problem else note for note in notes]
        if not any(note.startswith(problem) for note in notes):
            notes.append(f"no estimates: {problem}")
    inputs = EstimateInputs(config, found, shape, notes)
    sections = [section for make in SECTIONS if (section := make(inputs)) is not None]
    if as_json:
        print(json.dumps(_as_json(recipe, inputs, sections), indent=2, ensure_ascii=False))
        return
    _print(console, settings_lines(recipe))
    _print(console, (f"note: {note}" for note in notes))
    _print(console, (line for section in sections if not section.is_estimate for line in _lines(section)))
    if shape is not None:
        _print(console, [f"estimates, for {shape.num_parameters:,} parameters"])
    _print(console, (line for section in sections if section.is_estimate for line in _lines(section)))


def _try(config: RunConfig, notes: list[str]) -> TaskTrial:
    """Tries the prompts and the reward; without the model, only the task."""
    try:
        model_files(config.model.location, config.model.revision)
        is_model_here = True
    except UnavailableHere:
        is_model_here = False
    try:
        found = try_task(config, is_model_here)
    except UnavailableHere as problem:
        notes.append(str(problem))
        return TaskTrial()
    notes += trial_notes(found)
    return found


def _shape(config: RunConfig) -> tuple[Shape | None, str]:
    """The model's shape; or None, and the reason."""
    try:
        return shape_of(config), ""
    except ValueError as reason:
        return None, str(reason)


def _as_json(recipe: Recipe, inputs: EstimateInputs, sections: Iterable[Section]) -> dict[str, Any]:
    """`estimates`: bytes or seconds by title and by what; null where the model's shape is unknown."""
    shown: dict[str, Any] = {"settings": {}, "notes": inputs.notes, "estimates": None}
    for name, source in recipe.sources.items():
        value = json.loads(redact_url_passwords(json.dumps(_value(recipe.config, name))))
        shown["settings"][name] = {"value": value, "source": redact_url_passwords(source)}
    shown |= {section.title: section.value for section in sections if not section.is_estimate}
    if inputs.shape is not None:
        estimates = {section.title: section.value for section in sections if section.is_estimate}
        shown["estimates"] = {"parameters": inputs.shape.num_parameters} | estimates
    return shown


def settings_lines(recipe: Recipe) -> Iterator[str]:
    """`key value source` of every setting, an empty line after each section."""
    names = list(recipe.sources)
    width = max(len(name) for name in names)
    sections: dict[str, list[str]] = {}
    for name in names:
        sections.setdefault(name.rpartition(".")[0].partition(".")[0], []).append(name)
    for section in sections.values():
        for name in section:
            value = redact_url_passwords(_shown(_value(recipe.config, name)))
            yield f"{name:{width}}  {value:{VALUE_WIDTH}}  {redact_url_passwords(recipe.sources[name])}"
        yield ""


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def _lines(section: Section) -> Iterator[str]:
    for index, line in enumerate(section.lines):
        yield f"{section.title if index == 0 else '':8}  {line}"


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)
