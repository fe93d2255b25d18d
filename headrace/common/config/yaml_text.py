"""YAML reading and writing: the scalars of YAML 1.2's core schema, no repeated keys, errors with their line.

Differences from YAML 1.1, which PyYAML implements: `yes` and `on` are text, `1e-6` is a number, `12:30` and
`2026-11-30` are text, and everything in quotes is text. Differences from YAML 1.2: `1_000` is a number, and a number
with a leading zero is refused, because `0100` is 64 in YAML 1.1 and 100 in 1.2. What `dump` writes, `load` and readers
of YAML 1.1 read as the same values.
"""

import re
from typing import Any

import yaml

LEADING_ZERO = "!leading-zero"
SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (LEADING_ZERO, r"[-+]?0[0-9_]+(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?", list("-+0")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


def load(text: str) -> Any:
    """Raises `ValueError` with one line, which names the line of the text if it is known."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(where + ", ".join(filter(None, [error.context, error.problem]))) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split()) or "it is nested too deep") from error


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        name = (key.tag, str(key.value))
        if name in lines:
            raise _error(key, f"{key.value!r} is given again, first in line {lines[name]}")
        lines[name] = key.start_mark.line + 1
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value.replace("_", ""), 0)
    except ValueError as error:
        raise _error(node, f"{node.value[:60]!r} is no integer, or has more digits than any setting") from error


def _leading_zero(loader: _Loader, node: yaml.ScalarNode) -> None:
    raise _error(node, f"{node.value[:60]} has a leading zero: write it without, or in quotes if it is text")


def _error(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor(LEADING_ZERO, _leading_zero)
