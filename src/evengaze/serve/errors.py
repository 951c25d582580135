"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What went wrong with a request, as its client is told.

    Attributes:
        status: HTTP status.
        message: in a sentence.
        param: which field of the request, if one is to blame.
        code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, if that may help."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def full(places: int) -> ApiError:
    """The queue is full."""
    return ApiError(429, f"all {places} places of this server are taken; try again", code="queue_full")


def late(seconds: float) -> ApiError:
    """A request took too long."""
    return ApiError(504, f"the answer was not finished within {seconds:g} seconds", code="timeout")


def broken() -> ApiError:
    """An error that is not the client's."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def closing() -> ApiError:
    """The server stops."""
    return ApiError(503, "the server is stopping; try again", code="stopping")


def lost() -> ApiError:
    """The replicas that were to answer are no more."""
    return ApiError(503, "the replica that was answering has died; try again", code="replica_died")
