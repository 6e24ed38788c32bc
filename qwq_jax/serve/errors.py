"""What a client is told when it gets no answer: a status and OpenAI's error object."""

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"([a-z_]+)[\w.\[\]]*: ")


class ApiError(Exception):
    """Ends a request with `status` and ``{"error": {"message", "type", "param", "code"}}``.

    Attributes:
        status: HTTP status.
        retry_after: Seconds until it is worth asking again, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self._error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {"error": self._error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(error: ValueError, body: Mapping[str, Any]) -> ApiError:
    """400 with the sentence of a ValueError; its first word is the parameter, if it is a field of `body`."""
    named = _FIELD.match(str(error))
    return ApiError(400, str(error), param=named[1] if named and named[1] in body else None)


def unauthorized(given: bool) -> ApiError:
    """401, without a word about the key that was given."""
    message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key")


def unknown_model(name: str, served: str) -> ApiError:
    """404 for a model that is not served here."""
    return ApiError(404, f"model: {name!r} is not served here, only {served!r}", code="model_not_found", param="model")


def overloaded(retry_after: int) -> ApiError:
    """429: the line of waiting requests is full."""
    message = f"the line of waiting requests is full: try again in {retry_after} s"
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)


def shutting_down() -> ApiError:
    """503: nothing new is taken, or what runs has used up the time to end."""
    return ApiError(503, "the server is shutting down", type="server_error", code="shutting_down", retry_after=10)


def engine_failed(status: int = 500) -> ApiError:
    """500 for a request that ran when the engine died, 503 for one that came after."""
    return ApiError(status, "the engine failed: this server answers no more", type="server_error", code="engine_failed")
