"""The JSON schema of a Python function, as OpenAI's `tools` have it."""

import inspect
import re
from collections.abc import Callable
from typing import Any

_SECTION = re.compile(r"\n\s*(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?):\s*(?:\n|$)")
_PARAMETER = re.compile(r"^(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describes `function` to the model: its name, docstring and parameters.

    Types and defaults come from the signature, descriptions of parameters from `Annotated[..., pydantic.Field(
    description=...)]` or from an `Args:` section of the docstring. Raises `ValueError` for a function without a
    docstring, or whose parameters the model could not name.
    """
    name = name_of(function)
    text, described = _parse(inspect.getdoc(function) or "")
    if not text:
        raise ValueError(f"function {name!r} has no docstring; expected one that tells the model what it does")
    parameters = _parameters(function, name)
    for parameter, value in parameters["properties"].items():
        if parameter in described:
            value.setdefault("description", described[parameter])
    return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}


def name_of(function: Callable[..., Any]) -> str:
    """The name by which the model calls the function."""
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


def _parameters(function: Callable[..., Any], name: str) -> dict[str, Any]:
    from pydantic import PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema
    from pydantic.json_schema import GenerateJsonSchema

    class WithoutTitles(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    unnamed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    try:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in unnamed:
                raise ValueError(f"its parameter {str(parameter)!r} has no name in a call")
        adapter: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]
        found = adapter.json_schema(schema_generator=WithoutTitles)
    except (PydanticUserError, PydanticInvalidForJsonSchema, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"function {name!r}: {reason}; expected parameters with names, of types that JSON has"
        ) from error
    found.pop("additionalProperties", None)
    return {"type": "object", "properties": {}} | found


def _parse(docstring: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the descriptions in the section of parameters."""
    head, *sections = _SECTION.split("\n" + docstring)
    described: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            described |= _descriptions(body)
    return head.strip(), described


def _descriptions(section: str) -> dict[str, str]:
    """A description may go on in lines that are indented further than its first."""
    described: dict[str, str] = {}
    name, indent = "", -1
    for line in section.splitlines():
        found = _PARAMETER.match(line)
        if found and (indent < 0 or len(found[1]) <= indent):
            indent, name = len(found[1]), found[2]
            described[name] = found[3].strip()
        elif name and line.strip():
            described[name] = f"{described[name]} {line.strip()}".strip()
    return described
