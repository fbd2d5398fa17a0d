"""An answer that is an error, in the shape of each surface."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error with its HTTP status. param: the field it is about; code: a word for programs.

    retry_after: seconds until it may work. should_retry: what SDKs are told, None where they know themselves.
    extra: further fields beside `message`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        retry_after: float | None = None,
        should_retry: bool | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.retry_after, self.should_retry, self.extra = retry_after, should_retry, extra or {}

    def openai(self) -> dict[str, Any]:
        """The body on OpenAI's surfaces."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**self.extra, **fields}}

    def anthropic(self) -> dict[str, Any]:
        """The body on Anthropic's surface."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """retry-after and x-should-retry, where they are known."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers
