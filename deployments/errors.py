"""Exception types of the graph.

:mod:`cosmos3_core.errors` and :mod:`cluster.errors` hold the types of the layers below. All of them survive pickling
between processes, because their arguments are all that they hold. None repeats a prompt. :mod:`deployments.failures`
translates Ray's errors into these types, and these types into HTTP statuses and messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cosmos3_core.errors import Cosmos3Error


class ApiError(Cosmos3Error):
    """An error with an HTTP status and a code of its own, the short name of the error for programs."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers)
        super().__init__(status, code, message, self.headers)

    @classmethod
    def not_ready(cls, message: str, retry_after_s: int = 1) -> ApiError:
        """Return the error for a file that is not ready yet."""
        return cls(409, "media_not_ready", message, {"retry-after": str(retry_after_s)})

    def __str__(self) -> str:
        return self.message

    def as_json(self, **details: str) -> dict[str, Any]:
        """Return the body of the answer; ``details`` are more fields of :class:`deployments.api.call.ErrorDetails`."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None, **details}}


class BodyError(ApiError):
    """The request body cannot be parsed or is too large."""


class _GuardrailError(Cosmos3Error):
    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)


class ContentBlocked(_GuardrailError):
    """The guardrail blocked ``what`` of a request: "prompt" or "pictures"."""

    def __str__(self) -> str:
        advice = "; change the prompt" if self.what == "prompt" else ""
        return f"the guardrail has stopped the request because of its {self.what}{advice}"


class GuardrailUnavailable(_GuardrailError):
    """The guardrail failed, is away or takes too long, and has not checked ``what``: "prompt" or "pictures"."""

    def __str__(self) -> str:
        return f"the guardrail cannot look at the {self.what} just now, and nothing passes without; try again later"


class AdapterError(Cosmos3Error):
    """The guardrail adapter ``guardrails.adapter`` cannot be used; ``hint``, a full sentence, says what to do."""

    def __init__(self, adapter: str, problem: str, hint: str) -> None:
        self.adapter, self.problem, self.hint = adapter, problem, hint
        super().__init__(adapter, problem, hint)

    def __str__(self) -> str:
        return f"guardrails.adapter={self.adapter}: {self.problem}. {self.hint}"


class MediaStoreError(Cosmos3Error):
    """The media store's directory or archive cannot be used; the message says why and what to do."""


class JobsError(Cosmos3Error):
    """The jobs database cannot be used; the message says why and what to do."""


class TooManyEvents(JobsError):
    """The history of a job has no room for another event: more than any request can have."""


class IllegalTransition(JobsError):
    """A job cannot change its state from ``before`` to ``after``: a bug of ours."""

    def __init__(self, job_id: str, before: str, after: str) -> None:
        super().__init__(job_id, before, after)
        self.job_id, self.before, self.after = job_id, before, after

    def __str__(self) -> str:
        return f"{self.job_id} is {self.before}; it cannot become {self.after}"


class LeaseLost(JobsError):
    """The runner has lost a job: it has ended or was deleted, or its lease expired and another runner has it."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"{self.job_id} is not this runner's any more"


class JobCancelled(JobsError):
    """The job was stopped before its end."""

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(job_id, reason)
        self.job_id, self.reason = job_id, reason

    def __str__(self) -> str:
        return f"{self.job_id} was stopped before its end: {self.reason or 'it was deleted'}"


class IdempotencyConflict(JobsError):
    """An idempotency key was used for another request before."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the idempotency key {self.key!r} was used for another request; take a new one"
