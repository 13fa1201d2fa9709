"""Errors that come back from another process: what they really are, what callers are told, whether a retry can help."""

from __future__ import annotations

from ray.exceptions import (
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
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

# Retry-After where Serve's own queue was full: nothing is known of how long it stays so.
_FULL_QUEUE_S = 2.0

# A process or node died, or took an object with it; the same request on another replica can succeed. A stream that was
# closed under its consumer is the other side's death seen from here.
_RETRYABLE = (
    GangFailed,
    StreamClosed,
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    RaySystemError,
    NodeDiedError,
    LocalRayletDiedError,
    ActorUnschedulableError,
    ReplicaUnavailableError,
    # A saved state that the gang cannot read: the next try begins without it.
    StateError,
)


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


def unwrap_error(error: BaseException) -> BaseException:
    """The exception that a remote method raised, without Ray's wrapping and its traceback text."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def translate_error(error: BaseException, stage: str) -> BaseException:
    """The error as one of ours where it has a meaning: a full queue, a process that died; else as it was raised.

    What a stage may be tried again after stays itself if it is ours: a :class:`GangFailed` says more.
    """
    error = unwrap_error(error)
    if isinstance(error, BackPressureError):
        return OverloadedError(f"calls waiting for the stage {stage!r}", error.args[1], _FULL_QUEUE_S)
    if isinstance(error, (*_RETRYABLE, DeploymentUnavailableError)) and not isinstance(error, Cosmos3Error):
        return StageFailed(stage, 1, summarize_error(error))
    return error


def is_retryable(error: BaseException) -> bool:
    """Whether the same stage may succeed on another replica; never true of the request's own faults."""
    return isinstance(unwrap_error(error), _RETRYABLE)


def is_lost(error: BaseException) -> bool:
    """Whether an object that was to be used is gone."""
    return isinstance(unwrap_error(error), ObjectLostError)


def summarize_error(error: BaseException) -> str:
    """One line about an error."""
    error = unwrap_error(error)
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def explain_failure(error: BaseException) -> tuple[str, str]:
    """An error's code and message, as whoever asked may read them; of the inside they say nothing."""
    error = translate_error(error, "director")
    if isinstance(error, ApiError):
        return error.code, str(error)
    _, code = find_status(error)
    if isinstance(error, StageFailed):  # the reason is Ray's own words, with addresses and processes in them
        return code, f"the stage {error.stage!r} failed {error.attempts} times; {_LOGGED}"
    if isinstance(error, GangFailed):
        return code, f"a gang of processes failed during {error.phase!r}; {_LOGGED}"
    return code, _MESSAGES.get(code, str(error))


def is_explained(error: BaseException) -> bool:
    """Whether the answer for an error says what was wrong; else it belongs into the log."""
    error = translate_error(error, "director")
    if isinstance(error, StageFailed | GangFailed):
        return False
    return isinstance(error, ApiError) or find_status(error)[1] not in _MESSAGES


def find_status(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the code of an error that has none of its own; unknown ones are 500."""
    return next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, _INTERNAL))
