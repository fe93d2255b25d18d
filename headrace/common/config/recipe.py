"""Recipes: a YAML file that holds only what differs from the defaults, and `key=value` overrides on top.

`load_recipe` returns the resolved configuration with the source of every value, or raises `ConfigError` with one line
per problem: the file, the dotted key, the value, and what was expected.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from headrace.common.config import yaml_text
from headrace.common.config.actor import PRESETS
from headrace.common.config.model import NOT_OFFERED
from headrace.common.config.run import RunConfig
from headrace.common.config.section import section_in


class ConfigError(ValueError):
    """The configuration is invalid; the text has one line per problem."""


@dataclass(frozen=True)
class Recipe:
    config: RunConfig
    sources: dict[str, str]
    """Dotted key of every setting -> 'default', 'preset baseline', the file, or the override that gave it."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `path`, applies `section.key=value` overrides (values are YAML) and validates the result."""
    return resolve(_read_yaml(Path(path)), str(path), overrides)


def resolve(given: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`, for settings that were already read from `origin`."""
    sources = dict.fromkeys(_leaves(given, set(_setting_names(RunConfig))), origin)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: expected section.key=value")
        _assign(given, key.strip().split("."), _parse_value(override, text))
        sources[key.strip()] = f"--set {override}"
    return Recipe(config=validate(given, origin), sources=_all_sources(given, sources))


def validate(given: dict[str, Any], origin: str) -> RunConfig:
    """Raises `ConfigError`, each line starting with `origin`."""
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {describe_problem(problem)}" for problem in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml_text.load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'task:', got {type(given).__name__}")
    resolved: dict[str, Any] = given
    return resolved


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml_text.load(text)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _assign(given: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        given = given.setdefault(key, {})
        if not isinstance(given, dict):
            raise ConfigError(f"override of {'.'.join(keys)}: {key} is not a section")
    given[keys[-1]] = value


def _leaves(given: dict[str, Any], settings: set[str], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings that are given; the content of a setting that is a mapping is its value."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in settings:
            yield from _leaves(value, settings, f"{name}.")
        else:
            yield name


def _all_sources(given: dict[str, Any], sources: dict[str, str]) -> dict[str, str]:
    preset = (given.get("actor") or {}).get("preset")
    filled_in = {f"actor.{key}": f"preset {preset}" for key in PRESETS.get(str(preset), {})}
    every = dict.fromkeys(_setting_names(RunConfig), "default")
    return every | filled_in | {key: source for key, source in sources.items() if key in every}


def _setting_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if inner := section_in(field):
            yield from _setting_names(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def describe_problem(problem: Any) -> str:
    """One line for one of pydantic's errors about a `RunConfig`: the setting, its value, what was expected."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden" and where in NOT_OFFERED:
        return f"{where} is not offered: {NOT_OFFERED[where]}"
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a setting{_suggestion(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {problem['input']!r}: {message[:1].lower()}{message[1:]}"


def _suggestion(location: tuple[str | int, ...]) -> str:
    *sections, key = (str(part) for part in location)
    known = list(_section_at(sections).model_fields)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*sections, close[0]])}?"
    if sections == ["task"]:
        return f"; did you mean task.settings.{key}, an argument of the task?"
    elsewhere = [name for name in _setting_names(RunConfig) if name.rpartition(".")[2] == key]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; expected one of {', '.join(known)}"


def _section_at(sections: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in sections:
        inner = section.model_fields[name].annotation
        if typing.get_origin(inner) is types.UnionType or not isinstance(inner, type):
            break
        section = inner
    return section
