"""Translate errors from other processes into our own types, HTTP statuses and messages, and say what is to blame."""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import NamedTuple

from ray import exceptions as ray_errors
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

from cluster.errors import (
    ClusterError,
    DeadlineExceeded,
    GangFailed,
    OutOfMemory,
    OverloadedError,
    ShuttingDown,
    StageFailed,
    StreamClosed,
)
from cosmos3_core.errors import CapabilityError, Cosmos3Error, MediaError, RequestError, StateError
from deployments.errors import (
    ApiError,
    ContentBlocked,
    GuardrailUnavailable,
    IdempotencyConflict,
    IllegalTransition,
    JobCancelled,
    JobsError,
    MediaStoreError,
    TooManyEvents,
)

# Retry-After when Serve's own queue is full; a guess, as nothing says for how long.
_FULL_QUEUE_S = 2.0

# A process or node died, or took an object with it: the same request can succeed on another replica. A stream closed
# under its consumer means that the producer's process died.
_RETRYABLE = (
    *(GangFailed, StreamClosed, ReplicaUnavailableError, ray_errors.RayActorError, ray_errors.RaySystemError),
    *(ray_errors.ObjectLostError, ray_errors.WorkerCrashedError, ray_errors.NodeDiedError),
    *(ray_errors.LocalRayletDiedError, ray_errors.ActorUnschedulableError),
    StateError,  # the gang cannot read a saved state: the next attempt starts without it
)

MEDIA_FAULT, JOBS_FAULT = "media_unavailable", "jobs_unavailable"
"""Codes of faults that can be probed."""

_INTERNAL, _STAGE, _SYSTEM = "internal_error", "stage_failed", "system_error"


class Blame(StrEnum):
    """The cause of an error; it decides whether the accepted job that the error stopped ends or is requeued."""

    REQUEST = "request"
    """It would fail again: the job ends."""
    STAGE = "stage"
    """Processes were lost: the job goes back to the queue. An attempt counts if other jobs are completed meanwhile."""
    SURROUNDINGS = "surroundings"
    """A disk, a store or a database failed, or all is full: the job goes back to the queue, and no attempt counts."""


# Every error that stops a request. The first match wins, so subclasses stand before their bases; another error is a
# bug of ours, an internal error that is blamed on the request.
_TABLE: tuple[tuple[type[BaseException], int, str, Blame], ...] = (
    (CapabilityError, 422, "not_offered", Blame.REQUEST),
    (RequestError, 422, "invalid_field", Blame.REQUEST),
    (ContentBlocked, 400, "content_blocked", Blame.REQUEST),
    (GuardrailUnavailable, 503, "guardrail_unavailable", Blame.SURROUNDINGS),
    (OutOfMemory, 422, "out_of_memory", Blame.REQUEST),
    (OverloadedError, 429, "overloaded", Blame.SURROUNDINGS),
    (ShuttingDown, 503, "shutting_down", Blame.SURROUNDINGS),
    (DeadlineExceeded, 504, "deadline_exceeded", Blame.REQUEST),
    (StageFailed, 503, _STAGE, Blame.STAGE),
    (ClusterError, 503, "unavailable", Blame.STAGE),
    (StateError, 503, _STAGE, Blame.STAGE),
    (MediaError, 503, MEDIA_FAULT, Blame.SURROUNDINGS),
    (MediaStoreError, 503, MEDIA_FAULT, Blame.SURROUNDINGS),
    (IdempotencyConflict, 409, "idempotency_conflict", Blame.REQUEST),
    (JobCancelled, 409, "cancelled", Blame.REQUEST),
    (IllegalTransition, 503, JOBS_FAULT, Blame.REQUEST),
    (TooManyEvents, 503, JOBS_FAULT, Blame.REQUEST),
    (JobsError, 503, JOBS_FAULT, Blame.SURROUNDINGS),
    (OSError, 503, _SYSTEM, Blame.SURROUNDINGS),
)
_LOGGED = "the server's log has it under this request id"
# Their own messages would show addresses and paths.
_MESSAGES = {
    _INTERNAL: f"an internal error; {_LOGGED}",
    MEDIA_FAULT: f"the file could not be written or read; {_LOGGED}",
    JOBS_FAULT: f"the database of jobs cannot be used just now; {_LOGGED}",
    _SYSTEM: f"the operating system refused something; {_LOGGED}",
}
# Texts of the system's errors that an operator can do something about, and that hold no path.
_SYSTEM_TEXTS = tuple(
    os.strerror(number)
    for number in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ETIMEDOUT),
    )
)


def unwrap_error(error: BaseException) -> BaseException:
    """Return the exception that a remote method raised, without Ray's wrapper and traceback text."""
    while isinstance(error, ray_errors.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def translate_error(error: BaseException, stage: str) -> BaseException:
    """Translate errors of Python, Ray and Serve (no memory, a full queue, a dead process) into our own types.

    Others are returned unchanged.
    """
    error = unwrap_error(error)
    if isinstance(error, MemoryError):
        return OutOfMemory(str(error))
    if isinstance(error, BackPressureError):
        return OverloadedError(f"calls waiting for the stage {stage!r}", error.args[1], _FULL_QUEUE_S)
    if isinstance(error, ray_errors.RayError | RayServeException) and not isinstance(error, Cosmos3Error):
        return StageFailed(stage, 1, summarize_error(error))
    return error


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may succeed on another replica. False for faults of the request itself."""
    return isinstance(unwrap_error(error), _RETRYABLE)


def is_unavailable(error: BaseException) -> bool:
    """Whether a process cannot be reached: its node may be gone, which Ray is sure of only after a while."""
    return isinstance(unwrap_error(error), ray_errors.ActorUnavailableError)


def is_lost(error: BaseException) -> bool:
    """Whether an object of the object store is gone."""
    return isinstance(unwrap_error(error), ray_errors.ObjectLostError)


def summarize_error(error: BaseException) -> str:
    """Describe an error in one line."""
    error = unwrap_error(error)
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


class Explanation(NamedTuple):
    """An error as callers see it; its message holds no addresses, paths or process ids.

    Attributes:
        error: translated.
        status: of its HTTP answer; 500 for an unknown type.
        needs_log: whether the message hides what the error says, which must then be logged.
        blame: what it is blamed on.
    """

    error: BaseException
    status: int
    code: str
    message: str
    needs_log: bool
    blame: Blame

    @property
    def what(self) -> str:
        """The fault in a few words, for a job's status and for /ready: ``media_unavailable: Read-only file system``."""
        text = str(self.error)
        known = next((it for it in _SYSTEM_TEXTS if it in text), "")
        if isinstance(self.error, StageFailed):
            known = self.error.stage
        return f"{self.code}: {known}" if known else self.code


def explain_error(error: BaseException) -> Explanation:
    """Look up what an error means to a caller."""
    error = translate_error(error, "director")
    if isinstance(error, ApiError):
        return Explanation(error, error.status, error.code, error.message, needs_log=False, blame=Blame.REQUEST)
    found = ((status, code, blame) for kind, status, code, blame in _TABLE if isinstance(error, kind))
    status, code, blame = next(found, (500, _INTERNAL, Blame.REQUEST))
    hidden = _MESSAGES.get(code)
    if isinstance(error, StageFailed):  # its reason is Ray's text, with addresses and process ids
        hidden = f"the stage {error.stage!r} failed {error.attempts} times; {_LOGGED}"
    elif isinstance(error, GangFailed):
        hidden = f"a gang of processes failed during {error.phase!r}; {_LOGGED}"
    return Explanation(error, status, code, hidden or str(error), needs_log=hidden is not None, blame=blame)
