"""What can go wrong for a client. Both ways of talking to an app raise the same types.

    Cosmos3Error
    ├── RequestError            what was asked for is wrong: names the field, what was given, what is allowed
    ├── UnreachableError        no answer, none in time, or one that broke off
    ├── OverloadedError         a bound was reached; try again after ``retry_after_s``
    ├── ShuttingDown            the app is being stopped; the same
    ├── DeadlineExceeded        it was not done in the time it had
    ├── StageFailed, OutOfMemory  it could not be done
    ├── ContentBlocked          a guardrail has stopped it
    ├── JobCancelled            the job was stopped before its end
    ├── IdempotencyConflict     the idempotency key was used for another request
    └── AnswerError             any other answer that is a no; by its status and code
        ├── AuthError           the key is missing, wrong, or may not do this
        ├── NotFound            there is no such video, or not any more, or not this caller's
        ├── NotReady            there is no such file yet
        └── Unavailable         the service cannot just now; try again after ``retry_after_s``

Those that come from elsewhere in this tree hold less when they come over HTTP: what they say, and ``retry_after_s``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cluster.errors import DeadlineExceeded, OutOfMemory, OverloadedError, ShuttingDown, StageFailed
from cosmos3_core.errors import CapabilityError, Cosmos3Error, RequestError
from deployments.errors import ContentBlocked, IdempotencyConflict, JobCancelled

# For an answer that does not say when to come back.
_RETRY_AFTER_S = 5.0
_MAX_RETRY_AFTER_S = 86_400.0
_NOT_READY = "media_not_ready"


class UnreachableError(Cosmos3Error):
    """No answer, or none in time, or one that broke off."""


class AnswerError(Cosmos3Error):
    """The server said no.

    Args:
        status: of the answer, as HTTP has it; 500 for a job that failed.
        message: the server's own words.
        code: its short name for the fault; "" where it has none.
    """

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(status, message, code)

    def __str__(self) -> str:
        return self.message


class AuthError(AnswerError):
    """The API key is missing, wrong, or may not do this."""


class NotFound(AnswerError):
    """There is no such video or file, or not any more, or not this caller's."""

    @classmethod
    def video(cls, video_id: str) -> NotFound:
        """Of an id that nothing is known of."""
        return cls(404, f"there is no video {video_id!r}, or not any more", "not_found")


class NotReady(AnswerError):
    """There is no such file yet."""

    @classmethod
    def video(cls, video_id: str) -> NotReady:
        """Of one that is not finished."""
        return cls(409, f"there is no file of {video_id} yet; its progress says how far it is", _NOT_READY)


class Unavailable(AnswerError):
    """The service cannot do it just now.

    Args:
        status, message, code: as of any :class:`AnswerError`.
        retry_after_s: when to try again.
    """

    def __init__(self, status: int, message: str, code: str = "", retry_after_s: float = _RETRY_AFTER_S) -> None:
        super().__init__(status, message, code)
        self.retry_after_s = retry_after_s
        self.args = (status, message, code, retry_after_s)


class ToldOverloaded(OverloadedError):
    """:class:`OverloadedError` in a server's words.

    Args:
        message: what it said.
        retry_after_s: when a place is likely to be free.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, 0, retry_after_s)
        self.args = (message, retry_after_s)

    def __str__(self) -> str:
        return self.what


class ToldDeadline(DeadlineExceeded):
    """:class:`DeadlineExceeded` in a server's words, which are the argument."""

    def __init__(self, message: str) -> None:
        super().__init__("", 0.0)
        self.args = (message,)

    def __str__(self) -> str:
        return str(self.args[0])


class ToldStageFailed(StageFailed):
    """:class:`StageFailed` in a server's words, which are the argument."""

    def __init__(self, message: str) -> None:
        super().__init__("", 1, message)
        self.args = (message,)

    def __str__(self) -> str:
        return self.reason


class ToldOutOfMemory(OutOfMemory):
    """:class:`OutOfMemory` in a server's words, which are the argument."""

    def __str__(self) -> str:
        return self.what


class ToldContentBlocked(ContentBlocked):
    """:class:`ContentBlocked` in a server's words, which are the argument."""

    def __str__(self) -> str:
        return self.what


COMEBACK = (OverloadedError, ShuttingDown, Unavailable)
"""What says when to try again."""

_Make = Callable[[str, float], Cosmos3Error]
# Code of the server's error table -> the error, of its message and its Retry-After.
_BY_CODE: Mapping[str, _Make] = MappingProxyType(
    {
        "overloaded": ToldOverloaded,
        "shutting_down": lambda message, retry_after_s: ShuttingDown(retry_after_s),
        "deadline_exceeded": lambda message, retry_after_s: ToldDeadline(message),
        "stage_failed": lambda message, retry_after_s: ToldStageFailed(message),
        "out_of_memory": lambda message, retry_after_s: ToldOutOfMemory(message),
        "content_blocked": lambda message, retry_after_s: ToldContentBlocked(message),
    }
)
_KINDS: Mapping[int, type[AnswerError]] = MappingProxyType(
    {401: AuthError, 403: AuthError, 404: NotFound, 410: NotFound}
)


def refusal(
    status: int, reason: str, headers: Mapping[str, str], text: str, idempotency_key: str | None
) -> Cosmos3Error:
    """What an HTTP answer that is a no means.

    Args:
        status, reason: of the answer.
        headers: of the answer, names in lower case.
        text: its body; ours or another server's.
        idempotency_key: that the request had.
    """
    try:
        error = dict(json.loads(text)["error"])
        message, code = str(error["message"]), str(error.get("code") or "")
    except (ValueError, TypeError, KeyError):
        error, code = {}, ""
        message = f"HTTP {status} {reason}: {text.partition(chr(10))[0]}"
    if code == "idempotency_conflict" and idempotency_key is not None:
        return IdempotencyConflict(idempotency_key)
    if status == 422 and (parts := _parts(error)) is not None:
        return (CapabilityError if code == "not_offered" else RequestError).of_parts(*parts)
    return _meaning(status, message, code, _seconds(headers.get("retry-after")))


def failure(video_id: str, code: str, message: str) -> Cosmos3Error:
    """Why a job came to nothing, by what its ``error`` says."""
    if code == "cancelled":
        return JobCancelled(video_id, message)
    return _meaning(500, message, code, _RETRY_AFTER_S)


def _meaning(status: int, message: str, code: str, retry_after_s: float) -> Cosmos3Error:
    if code in _BY_CODE:
        return _BY_CODE[code](message, retry_after_s)
    if code == _NOT_READY:
        return NotReady(status, message, code)
    if status == 429:
        return ToldOverloaded(message, retry_after_s)
    if status == 503:
        return Unavailable(status, message, code, retry_after_s)
    if status == 504:
        return ToldDeadline(message)
    return _KINDS.get(status, AnswerError)(status, message, code)


def _parts(error: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    """Of a wrong field: name, what was given, what is allowed, what to do."""
    field, given, allowed, hint = (error.get(name) for name in ("param", "given", "allowed", "hint"))
    if isinstance(field, str) and isinstance(given, str) and isinstance(allowed, str):
        return field, given, allowed, hint if isinstance(hint, str) else ""
    return None


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or "")
    except ValueError:  # a date, or nothing
        return _RETRY_AFTER_S
    return seconds if 0 <= seconds <= _MAX_RETRY_AFTER_S else _RETRY_AFTER_S
