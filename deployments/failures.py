"""Translate errors from other processes into our own types, HTTP statuses and messages, and say which are retried."""

from __future__ import annotations

from typing import NamedTuple

from ray import exceptions as ray_errors
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

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
    JobCancelled,
    JobsError,
    MediaStoreError,
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

_INTERNAL, _MEDIA, _JOBS = "internal_error", "media_unavailable", "jobs_unavailable"

# The first match wins, so subclasses stand before their bases.
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
# Their own messages would show addresses and paths.
_MESSAGES = {
    _INTERNAL: f"an internal error; {_LOGGED}",
    _MEDIA: f"the file could not be written or read; {_LOGGED}",
    _JOBS: f"the database of jobs cannot be used just now; {_LOGGED}",
}


def unwrap_error(error: BaseException) -> BaseException:
    """Return the exception that a remote method raised, without Ray's wrapper and traceback text."""
    while isinstance(error, ray_errors.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def translate_error(error: BaseException, stage: str) -> BaseException:
    """Translate a full queue or a dead process into one of our own types; return other errors unchanged.

    Retryable errors of our own types are kept: a :class:`GangFailed` says more than a :class:`StageFailed`.
    """
    error = unwrap_error(error)
    if isinstance(error, BackPressureError):
        return OverloadedError(f"calls waiting for the stage {stage!r}", error.args[1], _FULL_QUEUE_S)
    if isinstance(error, (*_RETRYABLE, DeploymentUnavailableError)) and not isinstance(error, Cosmos3Error):
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
        is_complete: whether the message says everything; otherwise the error must be logged.
    """

    error: BaseException
    status: int
    code: str
    message: str
    is_complete: bool


def explain_error(error: BaseException) -> Explanation:
    """Look up what an error means to a caller."""
    error = translate_error(error, "director")
    if isinstance(error, ApiError):
        return Explanation(error, error.status, error.code, error.message, is_complete=True)
    found = ((status, code) for kind, status, code in _STATUS if isinstance(error, kind))
    status, code = next(found, (500, _INTERNAL))
    hidden = _MESSAGES.get(code)
    if isinstance(error, StageFailed):  # its reason is Ray's text, with addresses and process ids
        hidden = f"the stage {error.stage!r} failed {error.attempts} times; {_LOGGED}"
    elif isinstance(error, GangFailed):
        hidden = f"a gang of processes failed during {error.phase!r}; {_LOGGED}"
    return Explanation(error, status, code, hidden or str(error), is_complete=hidden is None)
