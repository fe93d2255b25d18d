"""Generates docs/configuration.md from the settings: `python -m headrace.common.config.document`."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from headrace.common.config.hot_reload import HOT_RELOADABLE
from headrace.common.config.run import RunConfig
from headrace.common.config.section import section_in

HEAD = """# Configuration

Every setting of a run. A recipe is a YAML file that holds only what differs from these defaults;
`--set section.key=value` overrides it, several times if needed. `headrace check RECIPE` prints every setting with the
source of its value. An unknown key is refused with a suggestion, an invalid combination with the reason.

Settings marked "live" can change while a run is live (`headrace settings NAME=VALUE`); a change applies from the
learner's next step. Units are in the names: `_s` seconds, `_bytes`, `_tokens`, `_steps`.

This page is generated: `python -m headrace.common.config.document > docs/configuration.md`. A test compares it.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def document() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD, *_section("", RunConfig)]
    return "\n".join(parts).rstrip() + "\n"


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    """The settings of one section as a table, then the sections within it."""
    inner = {key: kind for key, field in model.model_fields.items() if (kind := section_in(field))}
    own = {key: field for key, field in model.model_fields.items() if key not in inner}
    yield f"## {name or 'The run'}\n"
    if model.__doc__:
        yield " ".join(model.__doc__.split()) + "\n"
    if own:
        yield "| setting | type | default | live | meaning |"
        yield "|---|---|---|---|---|"
        for key, field in own.items():
            dotted = f"{name}.{key}" if name else key
            live = "yes" if dotted in HOT_RELOADABLE else ""
            text = " ".join((field.description or "").split())
            cells = (f"`{dotted}`", _type(field), _default(field), live, text)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    for key, kind in inner.items():
        yield from _section(f"{name}.{key}" if name else key, kind)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for constraint in field.metadata
        for key, sign in BOUNDS.items()
        if (value := getattr(constraint, key, None)) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    """`int`, `"a" | "b"`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type_name(kind) for kind in arguments if kind is not type(None))
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is not None and issubclass(origin, typing.Mapping):
        return "mapping"
    return {"str": "text", "bool": "`true` | `false`", "float": "number", "int": "whole number"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(document(), end="")
