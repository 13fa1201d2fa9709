"""Every error type has its HTTP status, code and body."""

from __future__ import annotations

import errno
import json
from types import ModuleType
from typing import Any

import pytest
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException

import cluster.errors
import cosmos3_core.errors
import deployments.errors
from cluster.errors import (
    DeadlineExceeded,
    GangFailed,
    GangLost,
    OutOfMemory,
    OverloadedError,
    ShuttingDown,
    StageFailed,
    StreamClosed,
)
from cosmos3_core.errors import CapabilityError, CheckpointError, MediaError, RequestError
from deployments import failures
from deployments.api.call import error_response
from deployments.errors import BodyError, IdempotencyConflict, JobCancelled, JobsError, LeaseLost, MediaStoreError
from deployments.failures import Blame, explain_error

# Raised before a stage is up, by tools, or for bugs of ours: never by a call of a stage.
NOT_OF_STAGES = {"AdapterError", "AppNotFound", "ClosedError", "MeasureError", "PreviewFailed"}
NOT_OF_STAGES |= {kind.__name__ for kind in (CheckpointError, *CheckpointError.__subclasses__())}

# What their base is blamed on holds for them as well. A new type is named here, or has a row of its own.
AS_THEIR_BASES = {"GangFailed", "GangLost", "StepAbandoned", "StreamClosed", "LeaseLost"}


def find_types(module: ModuleType) -> list[type[Exception]]:
    """Return the exception types that a module defines, for callers outside of it."""
    found = [it for it in vars(module).values() if isinstance(it, type) and issubclass(it, Exception)]
    return [it for it in found if it.__module__ == module.__name__ and not it.__name__.startswith("_")]


@pytest.mark.parametrize(
    "kind",
    [it for module in (cosmos3_core.errors, cluster.errors, deployments.errors) for it in find_types(module)],
    ids=lambda kind: kind.__name__,
)
def test_every_error_of_a_stage_is_blamed_on_something(kind: type[Exception]) -> None:
    rows = {row[0] for row in failures._TABLE}
    if kind.__name__ in AS_THEIR_BASES:
        assert rows & set(kind.__mro__[1:-2]), "its base has a row"
    elif kind.__name__ not in NOT_OF_STAGES | {"Cosmos3Error", "ApiError", "BodyError"}:
        assert kind in rows, "or an accepted job may end with an internal error"


@pytest.mark.parametrize(
    "error",
    [RayActorError(), TaskCancelledError(), DeploymentUnavailableError("decode")],
    ids=lambda it: type(it).__name__,
)
def test_errors_of_ray_are_blamed_on_the_stage(error: Exception) -> None:
    explained = explain_error(error)
    assert (explained.blame, explained.code, explained.what) == (Blame.STAGE, "stage_failed", "stage_failed: director")
    assert explained.needs_log


@pytest.mark.parametrize(
    ("error", "blame", "what"),
    [
        (RequestError("seed", -1, "0 or more"), Blame.REQUEST, "invalid_field"),
        (ZeroDivisionError("a bug"), Blame.REQUEST, "internal_error"),
        (StageFailed("decode", 3, "it died"), Blame.STAGE, "stage_failed: decode"),
        (MediaError("/a/place: Read-only file system"), Blame.SURROUNDINGS, "media_unavailable: Read-only file system"),
        (OSError(errno.EMFILE, "Too many open files"), Blame.SURROUNDINGS, "system_error: Too many open files"),
        (JobsError("postgresql://user:secret@host is away"), Blame.SURROUNDINGS, "jobs_unavailable"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_is_described_in_a_few_words(error: Exception, blame: Blame, what: str) -> None:
    assert (explain_error(error).blame, explain_error(error).what) == (blame, what)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (RequestError("seed", -1, "0 or more"), 422, "invalid_field", None),
        (BodyError(415, "wrong_content_type", "no"), 415, "wrong_content_type", None),
        (OutOfMemory("of 1 GiB"), 422, "out_of_memory", None),
        (OverloadedError("places", 4, 2.1), 429, "overloaded", "3"),
        (ShuttingDown(30), 503, "shutting_down", "30"),
        (DeadlineExceeded("decode", 60), 504, "deadline_exceeded", None),
        (StageFailed("encode", 3, "a secret address died"), 503, "stage_failed", "5"),
        (GangFailed("step", "a secret died", 2), 503, "unavailable", "5"),
        (GangLost("step", "a secret died"), 503, "unavailable", "5"),
        (StreamClosed("a", "why"), 503, "unavailable", "5"),
        (MediaError("/a/secret/place: No space left on device"), 503, "media_unavailable", "5"),
        (MediaStoreError("/a/secret/place cannot be used"), 503, "media_unavailable", "5"),
        (CapabilityError("seed", -1, "0 or more"), 422, "not_offered", None),
        (IdempotencyConflict("a"), 409, "idempotency_conflict", None),
        (JobCancelled("video_gen_1", "it was cancelled"), 409, "cancelled", None),
        (JobsError("postgresql://user:secret@host is away"), 503, "jobs_unavailable", "5"),
        (LeaseLost("a secret job"), 503, "jobs_unavailable", "5"),
        (HTTPException(404, "Not Found"), 404, "no_such_route", None),
        (RayActorError(), 503, "stage_failed", "5"),
        (ZeroDivisionError("a secret"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_error_has_its_status(error: Exception, status: int, code: str, retry_after: str | None) -> None:
    answer = error_response(error)
    body: dict[str, Any] = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, body["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry_after
    assert body["type"] == ("invalid_request_error" if status in (404, 409, 415, 422) else "server_error")
    assert "secret" not in body["message"]
    is_hidden = code in ("internal_error", "media_unavailable", "jobs_unavailable", "stage_failed")
    is_hidden |= isinstance(error, GangFailed)
    assert (is_hidden or isinstance(error, HTTPException)) != (str(error) in body["message"])
    if not isinstance(error, HTTPException):
        explained = explain_error(error)
        assert explained.needs_log == is_hidden
        assert (explained.code, explained.message) == (code, body["message"]), "the same of a job that failed"
    if isinstance(error, RequestError):
        assert (body["param"], body["given"], body["allowed"]) == ("seed", "-1", "0 or more")
