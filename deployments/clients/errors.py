"""The errors of a client. Both transports raise the same types.

    Cosmos3Error
    ├── RequestError            a field is wrong: names it, what was given, what must be true
    ├── UnreachableError        no answer, none in time, or one that broke off
    ├── OverloadedError         a bound was reached; try again after ``retry_after_s``
    ├── ShuttingDown            the app is shutting down; try again after ``retry_after_s``
    ├── DeadlineExceeded        the video was not done in time
    ├── StageFailed, OutOfMemory  the video failed
    ├── ContentBlocked          a guardrail blocked the request
    ├── JobCancelled            the job was stopped before its end
    ├── IdempotencyConflict     the idempotency key was used for another request
    └── AnswerError             any other refusal, by its status and code
        ├── AuthError           the key is missing, wrong, or may not do this
        ├── NotFound            no such video for this caller, or already deleted
        ├── NotReady            the file is not written yet
        └── Unavailable         the service cannot serve this now; try again after ``retry_after_s``

Errors that :mod:`cluster.errors` and :mod:`deployments.errors` define hold only their message and ``retry_after_s``
when they come over HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cluster.errors import DeadlineExceeded, OutOfMemory, OverloadedError, ShuttingDown, StageFailed
from cosmos3_core.errors import CapabilityError, Cosmos3Error, RequestError
from deployments.errors import ContentBlocked, IdempotencyConflict, JobCancelled

# For an answer without Retry-After.
_RETRY_AFTER_S = 5.0
_MAX_RETRY_AFTER_S = 86_400.0


class UnreachableError(Cosmos3Error):
    """No answer, or none in time, or one that broke off."""


class AnswerError(Cosmos3Error):
    """The server refused, with an HTTP status (500 for a failed job), a message and a code ("" where it has none)."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(status, message, code)

    def __str__(self) -> str:
        return self.message


class AuthError(AnswerError):
    """The API key is missing, wrong, or may not do this."""


class NotFound(AnswerError):
    """There is no such video or file for this caller, or it was deleted."""

    @classmethod
    def video(cls, video_id: str) -> NotFound:
        """Return the error for an unknown id."""
        return cls(404, f"video {video_id!r} not found, or already deleted", "not_found")


class NotReady(AnswerError):
    """The file is not written yet."""


class Unavailable(AnswerError):
    """The service cannot serve this now; try again after ``retry_after_s``."""

    def __init__(self, status: int, message: str, code: str = "", retry_after_s: float = _RETRY_AFTER_S) -> None:
        super().__init__(status, message, code)
        self.retry_after_s = retry_after_s
        self.args = (status, message, code, retry_after_s)


class _RemoteError(Cosmos3Error):
    """An error that came over HTTP: the server's message, and the arguments of the error's own type."""

    def __init__(self, message: str, *fields: Any) -> None:
        super().__init__(*fields)
        self.args = (message, *fields)

    def __str__(self) -> str:
        return str(self.args[0])


class RemoteOverloaded(_RemoteError, OverloadedError):
    """:class:`OverloadedError` with the server's message."""


class RemoteDeadlineExceeded(_RemoteError, DeadlineExceeded):
    """:class:`DeadlineExceeded` with the server's message."""


class RemoteStageFailed(_RemoteError, StageFailed):
    """:class:`StageFailed` with the server's message."""


class RemoteOutOfMemory(_RemoteError, OutOfMemory):
    """:class:`OutOfMemory` with the server's message."""


class RemoteContentBlocked(_RemoteError, ContentBlocked):
    """:class:`ContentBlocked` with the server's message."""


WITH_RETRY_AFTER = (OverloadedError, ShuttingDown, Unavailable)
"""Errors that hold ``retry_after_s``."""

# Code of the server's error table -> makes the error from the message and Retry-After.
_BY_CODE: Mapping[str, Callable[[str, float], Cosmos3Error]] = MappingProxyType(
    {
        "overloaded": lambda message, retry_after_s: RemoteOverloaded(message, message, 0, retry_after_s),
        "shutting_down": lambda message, retry_after_s: ShuttingDown(retry_after_s),
        "deadline_exceeded": lambda message, retry_after_s: RemoteDeadlineExceeded(message, "", 0.0),
        "stage_failed": lambda message, retry_after_s: RemoteStageFailed(message, "", 1, message),
        "out_of_memory": lambda message, retry_after_s: RemoteOutOfMemory(message, message),
        "content_blocked": lambda message, retry_after_s: RemoteContentBlocked(message, message),
    }
)
# Status of an answer with another code, or from another server -> the code with the same meaning.
_CODE_OF_STATUS: Mapping[int, str] = MappingProxyType({429: "overloaded", 504: "deadline_exceeded"})
_KINDS: Mapping[int, type[AnswerError]] = MappingProxyType(
    {401: AuthError, 403: AuthError, 404: NotFound, 410: NotFound}
)


def read_refusal(
    status: int, reason: str, headers: Mapping[str, str], text: str, idempotency_key: str | None
) -> Cosmos3Error:
    """Return the error that an answer of an app or of a proxy means; names in ``headers`` are in lower case."""
    try:
        error = dict(json.loads(text)["error"])
        message, code = str(error["message"]), str(error.get("code") or "")
    except (ValueError, TypeError, KeyError):
        error, code = {}, ""
        message = f"HTTP {status} {reason}: {text.partition(chr(10))[0]}"
    if code == "idempotency_conflict" and idempotency_key is not None:
        return IdempotencyConflict(idempotency_key)
    if status == 422 and (parts := _read_field_error(error)) is not None:
        return (CapabilityError if code == "not_offered" else RequestError).of_parts(*parts)
    return make_error(status, message, code, read_retry_after(headers.get("retry-after")))


def read_failure(video_id: str, code: str, message: str) -> Cosmos3Error:
    """Return the error of a failed job from the code and message of its ``error``."""
    if code == "cancelled":
        return JobCancelled(video_id, message)
    return make_error(500, message, code)


def make_error(status: int, message: str, code: str, retry_after_s: float = _RETRY_AFTER_S) -> Cosmos3Error:
    """Return the error that a status and a code stand for."""
    if code == "media_not_ready":
        return NotReady(status, message, code)
    if make := _BY_CODE.get(code) or _BY_CODE.get(_CODE_OF_STATUS.get(status, "")):
        return make(message, retry_after_s)
    if status == 503:
        return Unavailable(status, message, code, retry_after_s)
    return _KINDS.get(status, AnswerError)(status, message, code)


def _read_field_error(error: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    """Return an answer's field, what was given, what must be true, and what to do; None if it names no field."""
    field, given, allowed, hint = (error.get(name) for name in ("param", "given", "allowed", "hint"))
    if isinstance(field, str) and isinstance(given, str) and isinstance(allowed, str):
        return field, given, allowed, hint if isinstance(hint, str) else ""
    return None


def read_retry_after(text: str | None) -> float:
    """Return the seconds of a Retry-After header; a usual number for a date, or none."""
    try:
        seconds = float(text or "")
    except ValueError:  # a date, or nothing
        return _RETRY_AFTER_S
    return seconds if 0 <= seconds <= _MAX_RETRY_AFTER_S else _RETRY_AFTER_S
