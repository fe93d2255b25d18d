"""The base of every request and response body, and the body of every error."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def whole_float_to_int(value: Any) -> Any:
    """JSON has one type of number, so 3.0 is accepted as a whole number; strings and booleans are not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(whole_float_to_int)]


class ResponseBody(BaseModel):
    model_config = ConfigDict(frozen=True)


class RequestBody(BaseModel):
    """Rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Problem(ResponseBody):
    """Every error response: problem details as in RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
