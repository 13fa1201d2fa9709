"""Errors that come back from another process: what they really are, and whether trying again can help."""

from __future__ import annotations

from ray.exceptions import ObjectLostError, RayActorError, RaySystemError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import ReplicaUnavailableError

from cluster.errors import GangFailed, StreamClosed

# A process or node died, or took an object with it; the same request on another replica can succeed. A stream that was
# closed under its consumer is the other side's death seen from here.
_RETRYABLE = (
    GangFailed,
    StreamClosed,
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    RaySystemError,
    ReplicaUnavailableError,
)


def unwrapped(error: BaseException) -> BaseException:
    """The exception that a remote method raised, without Ray's wrapping and its traceback text."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_retryable(error: BaseException) -> bool:
    """Whether the same stage may succeed on another replica; never true of the request's own faults."""
    return isinstance(unwrapped(error), _RETRYABLE)


def in_words(error: BaseException) -> str:
    """One line about an error."""
    error = unwrapped(error)
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
