"""A request that gets no reply of the model: the HTTP status, and the error object that OpenAI's clients read."""

from typing import Any

from headrace.common.wire import one_line

EPISODE_OVER = "the episode is over"


class GatewayError(Exception):
    """Answered with `status`; the text is one line that says what was found and what was expected."""

    def __init__(self, status: int, text: str, code: str | None = None) -> None:
        super().__init__(one_line(text))
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class BadRequest(GatewayError):
    """The request is not understood, or asks for what is not supported."""

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(400, text, code)
