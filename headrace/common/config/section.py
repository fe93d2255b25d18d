"""The base class of every section of the configuration: frozen, rejects unknown keys, every field documented."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

AUTO_DEVICE = (
    "auto: CUDA if a GPU is visible and a CUDA build of torch and SGLang's kernels are installed; else the CPU."
)
"""Description of the setting `device` of the learner and of engines."""


def section_in(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the section that a field holds; None if the field is a setting."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_non_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects `true` and `"5"` where a number is expected; pydantic would convert them."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = {annotation, *typing.get_args(annotation)}
        if isinstance(value, bool | str) and kinds & {int, float} and type(value) not in kinds:
            given = "text" if isinstance(value, str) else "true or false"
            raise PydanticCustomError("no_number", "expected a number, got {given}", {"given": given})
        return value
