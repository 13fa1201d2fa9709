"""Every error type has its HTTP status, code and body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException

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
from cosmos3_core.errors import CapabilityError, MediaError, RequestError
from deployments.api.call import error_response
from deployments.errors import BodyError, IdempotencyConflict, JobCancelled, JobsError, LeaseLost, MediaStoreError
from deployments.failures import explain_error


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
        assert explained.is_complete != is_hidden
        assert (explained.code, explained.message) == (code, body["message"]), "the same of a job that failed"
    if isinstance(error, RequestError):
        assert (body["param"], body["given"], body["allowed"]) == ("seed", "-1", "0 or more")
