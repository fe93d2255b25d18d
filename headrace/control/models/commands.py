"""The bodies of the endpoints that change a run: replicas, settings, and the answer to every command."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt

from headrace.common.wire.desired_state import MAX_REPLICAS
from headrace.control.models.bodies import RequestBody, ResponseBody, WholeNumber, whole_float_to_int
from headrace.control.models.status import Status


class Setting(ResponseBody):
    value: int | float | None
    configured: int | float | None
    description: str


class SettingsResponse(ResponseBody):
    version: int = Field(description="Grows by one with every change; 0: as configured.")
    applied_version: int = Field(description="The version that the learner uses.")
    settings: dict[str, Setting] = Field(description="By dotted name, as in a recipe.")
    config: dict[str, Any] = Field(description="The whole configuration at the start of the run, without secrets.")


class SettingsChange(RequestBody):
    version: WholeNumber | None = Field(
        None, description="The version that the change is based on: 409 if the settings have another one by now."
    )
    settings: dict[str, StrictInt | StrictFloat | None] = Field(
        min_length=1,
        max_length=16,
        description="New values by name; null resets a setting to the configured value.",
        examples=[{"optimizer.lr": 1e-5}],
    )


class DesiredReplicas(RequestBody):
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS), BeforeValidator(whole_float_to_int)] | None = Field(
        description="The number to keep running; null clears the target."
    )


class CommandAccepted(ResponseBody):
    """The command is stored in Redis; `text` says what it will cause."""

    text: str
    status: Status | None = None
