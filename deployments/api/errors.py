"""Errors as HTTP answers: one table from type to status, one body shape (OpenAI's, with what is allowed added)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.errors import (
    ClusterError,
    DeadlineExceeded,
    GangFailed,
    OutOfMemory,
    OverloadedError,
    ShuttingDown,
    StageFailed,
)
from cosmos3_core.errors import CapabilityError, Cosmos3Error, MediaError, RequestError
from deployments.errors import typed
from deployments.guardrails.errors import ContentBlocked, GuardrailUnavailable
from deployments.jobs.job import IdempotencyConflict, JobCancelled, JobsError
from deployments.media_store import MediaStoreError
from deployments.metrics import metrics


class Refusal(Cosmos3Error):
    """A fault that only HTTP has.

    Args:
        status: of the answer.
        code: short name of the fault.
        message: what is wrong and what is allowed.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers)
        super().__init__(status, code, message, self.headers)

    def __str__(self) -> str:
        return self.message


class BodyError(Refusal):
    """A request body that cannot be read at all."""


_INTERNAL, _MEDIA, _JOBS = "internal_error", "media_unavailable", "jobs_unavailable"

# First match wins: more special types stand first.
_STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (CapabilityError, 422, "not_offered"),
    (RequestError, 422, "invalid_field"),
    (ContentBlocked, 400, "content_blocked"),
    (GuardrailUnavailable, 503, "guardrail_unavailable"),
    (OutOfMemory, 422, "out_of_memory"),
    (OverloadedError, 429, "overloaded"),
    (ShuttingDown, 503, "shutting_down"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (StageFailed, 503, "stage_failed"),
    (ClusterError, 503, "unavailable"),
    (MediaError, 503, _MEDIA),
    (MediaStoreError, 503, _MEDIA),
    (IdempotencyConflict, 409, "idempotency_conflict"),
    (JobCancelled, 409, "cancelled"),
    (JobsError, 503, _JOBS),
)
_LOGGED = "the server's log has it under this request id"
# Of errors that are about the inside: addresses, paths.
_MESSAGES = {
    _INTERNAL: f"an internal error; {_LOGGED}",
    _MEDIA: f"the file could not be written or read; {_LOGGED}",
    _JOBS: f"the database of jobs cannot be used just now; {_LOGGED}",
}


def error_response(error: BaseException) -> JSONResponse:
    """The answer for an error; unknown ones become a 500. Those and files say nothing of the inside.

    Serve puts the request's id into the headers of every answer.
    """
    error = typed(error, "director")
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # the framework's own: no such path, another method
        message = f"{error.detail}; /openapi.json has all routes"
        return _response(error.status_code, "no_such_route", message, dict(error.headers or {}))
    if isinstance(error, Refusal):
        return _response(error.status, error.code, str(error), error.headers)
    status, _ = _meaning(error)
    if isinstance(error, OverloadedError):
        metrics().rejected(error.what)
    extra: dict[str, Any] = {}
    if isinstance(error, RequestError):
        extra = {"param": error.field, "given": error.given, "allowed": error.allowed, "hint": error.hint}
    if status in (429, 503):
        headers["retry-after"] = str(math.ceil(getattr(error, "retry_after_s", 5.0)))
    return _response(status, *failure_of(error), headers, **extra)


def failure_of(error: BaseException) -> tuple[str, str]:
    """An error's code and message, as whoever asked may read them; of the inside they say nothing."""
    error = typed(error, "director")
    if isinstance(error, Refusal):
        return error.code, str(error)
    _, code = _meaning(error)
    if isinstance(error, StageFailed):  # the reason is Ray's own words, with addresses and processes in them
        return code, f"the stage {error.stage!r} failed {error.attempts} times; {_LOGGED}"
    if isinstance(error, GangFailed):
        return code, f"a gang of processes failed during {error.phase!r}; {_LOGGED}"
    return code, _MESSAGES.get(code, str(error))


def is_told(error: BaseException) -> bool:
    """Whether the answer for an error says what was wrong; else it belongs into the log."""
    error = typed(error, "director")
    if isinstance(error, StageFailed | GangFailed):
        return False
    return isinstance(error, HTTPException | Refusal) or _meaning(error)[1] not in _MESSAGES


def _meaning(error: BaseException) -> tuple[int, str]:
    return next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, _INTERNAL))


def _response(status: int, code: str, message: str, headers: dict[str, str], **extra: Any) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code, "param": None, **extra}}
    return JSONResponse(body, status_code=status, headers=headers)
