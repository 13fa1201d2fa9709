"""Errors as HTTP answers of one shape: OpenAI's, with what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.errors import OverloadedError
from cosmos3_core.errors import RequestError
from deployments import failures
from deployments.api_model import ApiModel
from deployments.errors import ApiError
from deployments.failures import explain_failure, find_status, translate_error
from deployments.observability.metrics import metrics


class ErrorDetails(ApiModel):
    """A fault of a request, or of the service while it worked on it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    code: Annotated[str, Field(description="short name of the fault")]
    param: Annotated[str | None, Field(description="the field at fault")]
    given: Annotated[str, Field(description="what it held, shortened")] = ""
    allowed: Annotated[str, Field(description="what would have been accepted")] = ""
    hint: Annotated[str, Field(description="what to do")] = ""


class Error(ApiModel):
    """The body of every answer that is a refusal or a failure."""

    error: ErrorDetails


def error_response(error: BaseException) -> JSONResponse:
    """Return the answer for an error. Unknown errors become a 500 that reveals nothing internal.

    Serve puts the request's id into the headers of every answer.
    """
    error = translate_error(error, "director")
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # the framework's own: no such path, another method
        message = f"{error.detail}; /openapi.json has all routes"
        return _response(error.status_code, "no_such_route", message, dict(error.headers or {}))
    if isinstance(error, ApiError):
        return _response(error.status, error.code, str(error), error.headers)
    status, _ = find_status(error)
    if isinstance(error, OverloadedError):
        metrics().count_rejection(error.what)
    extra: dict[str, Any] = {}
    if isinstance(error, RequestError):
        extra = {"param": error.field, "given": error.given, "allowed": error.allowed, "hint": error.hint}
    if status in (429, 503):
        headers["retry-after"] = str(math.ceil(getattr(error, "retry_after_s", 5.0)))
    return _response(status, *explain_failure(error), headers, **extra)


def is_explained(error: BaseException) -> bool:
    """Return whether the answer says everything about the error; otherwise the error must be logged."""
    return isinstance(error, HTTPException) or failures.is_explained(error)


def _response(status: int, code: str, message: str, headers: dict[str, str], **extra: Any) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code, "param": None, **extra}}
    return JSONResponse(body, status_code=status, headers=headers)
