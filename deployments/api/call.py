"""One call of the API: its request, service and caller, the parameters that routes share, and its errors as answers.

Errors are answered in one shape: OpenAI's, with what was given and what is allowed.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Header, Path
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import OverloadedError
from cosmos3_core.errors import RequestError
from deployments.api.auth import Caller
from deployments.api.bodies import (
    B,
    NamedFields,
    ParsedBody,
    R,
    make_unknown_name_error,
    parse_body,
    translate_fault,
)
from deployments.api.body_reader import Reservation, read_fields
from deployments.api.remote_media import fetch_remote
from deployments.api.service import Service
from deployments.api_model import ApiModel
from deployments.errors import ApiError, BodyError
from deployments.failures import explain_error
from deployments.jobs.job import SubmitOptions
from deployments.media.layout import JOB_ID
from deployments.observability.metrics import REJECTIONS, metrics
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

CALLER = "cosmos3.caller"
"""Key of the caller in a request's scope."""

_RETRY_AFTER_S = 5.0
_UNUSED_KEY = "Idempotency-Key is without effect: the answer is the file itself"
# For headers that logs and the database repeat.
_VISIBLE = {"pattern": r"^[\x21-\x7e]{1,128}$"}


class ErrorDetails(ApiModel):
    """A fault of a request, or of the service while it worked on it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    code: Annotated[str, Field(description="short name of the fault")]
    param: Annotated[str | None, Field(description="the field at fault")]
    given: Annotated[str, Field(description="what it held, shortened")] = ""
    allowed: Annotated[str, Field(description="what would have been accepted")] = ""
    hint: Annotated[str, Field(description="what to do")] = ""


class Error(ApiModel):
    """The body of every answer that is a refusal or a failure."""

    error: ErrorDetails


def error_response(error: BaseException) -> JSONResponse:
    """Return the answer for an error. Unknown errors become a 500 that reveals nothing internal.

    Serve puts the request's id into the headers of every answer.
    """
    if isinstance(error, HTTPException):  # the framework's own: no such path, another method
        message = f"{error.detail}; /openapi.json has all routes"
        return _respond(ApiError(error.status_code, "no_such_route", message, dict(error.headers or {})))
    error, status, code, message, *_ = explain_error(error)
    if isinstance(error, ApiError):
        return _respond(error)
    headers, details = {}, {}
    if isinstance(error, OverloadedError):
        metrics().record(REJECTIONS, 1, error.what)
    if isinstance(error, RequestError):
        details = {"param": error.field, "given": error.given, "allowed": error.allowed, "hint": error.hint}
    if status in (429, 503):
        headers = {"retry-after": str(math.ceil(getattr(error, "retry_after_s", _RETRY_AFTER_S)))}
    return _respond(ApiError(status, code, message, headers), **details)


def _respond(error: ApiError, **details: str) -> JSONResponse:
    return JSONResponse(error.as_json(**details), status_code=error.status, headers=error.headers)


def answer_error(error: Exception, operation: str) -> JSONResponse:
    """Return the answer for the error of an operation; log one that the answer does not explain."""
    if explain_error(error).needs_log:
        logger.exception("%s failed", operation)
    return error_response(error)


class AnsweringRoute(APIRoute):
    """A route whose errors become answers, but for the framework's own, which the app answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the base's handler so that its errors are answered."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await answer_errors(handle(request), f"{request.method} {self.path}")

        return answer


async def answer_errors(handling: Coroutine[Any, Any, Response], operation: str) -> Response:
    """Return a route's answer, or that of its error; raise HTTPException."""
    try:
        return await handling
    except HTTPException:
        raise
    except RequestValidationError as error:  # of parameters and headers; bodies are our own
        return error_response(translate_fault(error.errors()[0]))
    except Exception as error:  # noqa: BLE001 - logged unless it is explained
        return answer_error(error, operation)


def make_router() -> APIRouter:
    """Return an empty router of :class:`AnsweringRoute`."""
    return APIRouter(route_class=AnsweringRoute)


@dataclass(frozen=True)
class Call:
    """One request, the service that it is for, and the caller."""

    request: Request
    service: Service
    caller: Caller

    async def read_fields(self, model: type[B], reserved: Reservation) -> NamedFields[B]:
        """Read the request's body; raise as :func:`~deployments.api.body_reader.read_fields`, or RequestError."""
        fields = await read_fields(self.request, self.service.http.max_body_bytes, reserved, model.lists())
        # In threads: texts and base64 of the largest files take seconds.
        return await run_in_thread(NamedFields.of, fields, model)

    async def read_body(self, model: type[R], reserved: Reservation) -> ParsedBody[R]:
        """Read and check the request's body, and fetch the files that it names by URL; raise as they do."""
        named = await self.read_fields(model, reserved)
        if self.service.fetch_file is not None:
            named = replace(named, values=await fetch_remote(named.values, self.service.fetch_file, reserved))
        return await run_in_thread(parse_body, named, self.service.rules_for(self.caller))

    def complete_options(
        self,
        options: SubmitOptions,
        request_id: str | None,
        idempotency_key: str | None = None,
        *,
        unused_key: str | None = None,
    ) -> SubmitOptions:
        """Complete a body's options with the caller and the headers; ``unused_key`` is a key without effect."""
        return replace(
            options,
            request_id=request_id,
            owner=self.caller.owner,
            classes=self.caller.classes,
            limits=self.caller.limits,
            idempotency_key=idempotency_key,
            warnings=options.warnings if unused_key is None else (_UNUSED_KEY, *options.warnings),
        )


def get_service(request: Request) -> Service:
    """Return the service of the application."""
    return cast(Service, request.app.state.get_service())


async def make_call(request: Request) -> Call:
    """Make the call of a request; raise RequestError for a query parameter that is unknown or given twice."""
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    seen = set()
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise make_unknown_name_error(name, value, known, "query parameter")
        if name in seen:
            raise RequestError(name, value, "given once")
        seen.add(name)
    return Call(request, get_service(request), request.scope[CALLER])


def _visible(name: str) -> AfterValidator:
    """Return a validator for a header that logs and the database repeat."""

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_VISIBLE["pattern"], value, re.ASCII):
            raise BodyError(400, "invalid_header", f"{name} must be 1 to 128 visible ASCII characters")
        return value

    return AfterValidator(check)


CurrentCall = Annotated[Call, Depends(make_call)]
VideoId = Annotated[str, Path(json_schema_extra={"pattern": f"^{JOB_ID.pattern}$"})]
RequestId = Annotated[
    str | None,
    Header(alias="X-Request-Id", description="the caller's name for it, for logs", json_schema_extra=_VISIBLE),
    _visible("x-request-id"),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="sent again with the same request, it gives the same job",
        json_schema_extra=_VISIBLE,
    ),
    _visible("idempotency-key"),
]
UnusedKey = Annotated[str | None, Header(alias="Idempotency-Key", include_in_schema=False), _visible("idempotency-key")]
"""The idempotency key of a request that it has no effect on."""
