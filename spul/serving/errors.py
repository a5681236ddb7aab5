"""Errors of OpenAI's API: a refused or failed request, and those that several parts of a server raise."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refused or failed request, in OpenAI's shape of an error.

    Args:
        status: the HTTP status.
        message: for the client; it has no text of the request and no name of a prompt.
        param: the field at fault.
        code: OpenAI's code, for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_long(room: int, num_tokens: int, max_tokens: int) -> ApiError:
    """The error of a request that leaves its answer no room.

    Args:
        room: tokens that the model has positions for.
        num_tokens: of the request.
        max_tokens: of the answer.
    """
    return ApiError(
        400,
        f"the maximum context length is {room} tokens; the request has {num_tokens}, and {max_tokens} are asked for. "
        "Shorten it, or ask for fewer.",
        code="context_length_exceeded",
    )


def too_many() -> ApiError:
    """The error of a request for which no room is left in a queue."""
    return ApiError(429, "too many requests wait; try later.", code="rate_limit_exceeded")


def stopping() -> ApiError:
    """The error of a request to an engine that answers no more."""
    return ApiError(503, "the server is stopping.")


def prompts_changed() -> ApiError:
    """The error of a request whose prompt was revoked or replaced while it waited: it is not answered without it."""
    return ApiError(
        503, "the prompts changed while the request waited; send the request again.", code="prompts_changed"
    )


def other_model(model: str) -> ApiError:
    """The error of a request to another model than the one that is served."""
    return ApiError(404, f"there is no model of this name; expected {model!r}.", "model", "model_not_found")
