"""What a request is refused with, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout",
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was expected, what was found.
        param: field of the request, `messages[0].content`; None: it is not about a field.
        code: for programs.
        retry_after: seconds until another try makes sense; None: it makes none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def document(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
