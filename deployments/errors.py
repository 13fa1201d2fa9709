"""Errors that come back from another process: what they really are, and whether trying again can help."""

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

from cluster.errors import GangFailed, OverloadedError, StageFailed, StreamClosed
from cosmos3_core.errors import Cosmos3Error, StateError

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


def unwrapped(error: BaseException) -> BaseException:
    """The exception that a remote method raised, without Ray's wrapping and its traceback text."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def typed(error: BaseException, stage: str) -> BaseException:
    """The error as one of ours where it has a meaning: a full queue, a process that died; else as it was raised.

    What a stage may be tried again after stays itself if it is ours: a :class:`GangFailed` says more.
    """
    error = unwrapped(error)
    if isinstance(error, BackPressureError):
        return OverloadedError(f"calls waiting for the stage {stage!r}", error.args[1], _FULL_QUEUE_S)
    if isinstance(error, (*_RETRYABLE, DeploymentUnavailableError)) and not isinstance(error, Cosmos3Error):
        return StageFailed(stage, 1, in_words(error))
    return error


def is_retryable(error: BaseException) -> bool:
    """Whether the same stage may succeed on another replica; never true of the request's own faults."""
    return isinstance(unwrapped(error), _RETRYABLE)


def is_lost(error: BaseException) -> bool:
    """Whether an object that was to be used is gone."""
    return isinstance(unwrapped(error), ObjectLostError)


def in_words(error: BaseException) -> str:
    """One line about an error."""
    error = unwrapped(error)
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
