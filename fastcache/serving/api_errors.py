"""An error as OpenAI's clients read it: a status, and a body with a message, a type, a parameter and a code."""

from __future__ import annotations

from typing import Any

from fastcache.errors import EngineStopped, PromptTooLong, QueueFull, UserError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "overloaded_error",
}
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is answered with an error. The message says what was given, what is allowed, what to do."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: UserError) -> ApiError:
        if isinstance(error, QueueFull):
            return cls(429, str(error), code="queue_full")
        if isinstance(error, EngineStopped):
            return cls(503, str(error), code="engine_stopped")
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return cls(400, str(error), code=code)

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 429 else {}
