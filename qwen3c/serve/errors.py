"""Answers that are errors, in the words of the two families of clients: OpenAI's and Anthropic's."""

from __future__ import annotations

import math
from typing import Any

VERSION = "anthropic-version"  # a header that all clients of Anthropic's API send
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error.

    status: of HTTP. param: the field at fault, as a dotted path. code: for programs. retry_after: seconds
    after which the request may succeed. should_retry: false tells openai-python not to send the request again
    by itself. extra: further fields of the error object.
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
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.extra = extra or {}

    def openai(self) -> dict[str, Any]:
        """The body as OpenAI's ErrorResponse."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | self.extra}

    def anthropic(self) -> dict[str, Any]:
        """The body as Anthropic's ErrorResponse."""
        type = ANTHROPIC_TYPES.get(
            self.status, "api_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": type, "message": self.message} | self.extra}

    def headers(self) -> dict[str, str]:
        """What the answer's headers say of trying again."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


def speaks_anthropic(path: str, names_version: bool) -> bool:
    """Whether an answer is in Anthropic's words. names_version: the request has their header for that."""
    return path.startswith("/v1/messages") or (names_version and path.startswith("/v1/models"))


def server_error(message: str, code: str | None = None) -> ApiError:
    """The engine or the server failed; the same request would fail again."""
    return ApiError(500, message, type="server_error", code=code, should_retry=False)


def grammar_error(message: str) -> ApiError:
    """A reply cannot go on as its schema, grammar or tools have it: another request can, this one cannot."""
    return ApiError(
        400,
        f"{message}; the reply cannot go on: ask with a simpler schema, grammar or tools, or smaller bounds",
        code="grammar_failed",
        should_retry=False,
    )


def context_error(n_prompt: int, context: int, param: str, told: str = "") -> ApiError:
    """The prompt, which the field `param` holds, does not fit into the context. told: in other words."""
    return ApiError(
        400,
        told or f"the prompt is {n_prompt} tokens, the context holds {context}",
        param=param,
        code="context_length_exceeded",
        extra={"n_prompt_tokens": n_prompt, "n_ctx": context},
    )
