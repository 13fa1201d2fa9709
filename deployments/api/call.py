"""One call of the API: its request, service and caller, the parameters that routes share, and its errors as answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cosmos3_core.errors import RequestError
from deployments.api.auth import Caller
from deployments.api.bodies import B, NamedFields, ParsedBody, R, parse_body, request_error, start_of, unknown_name
from deployments.api.body_reader import Reservation, read_fields
from deployments.api.errors import error_response, is_explained
from deployments.api.media_fields import fetch_remote
from deployments.api.service import Service
from deployments.errors import BodyError
from deployments.jobs.job import SubmitOptions
from deployments.media.layout import JOB_ID
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

CALLER = "cosmos3.caller"
"""Key of the caller in a request's scope."""

_NO_REPLAY = "Idempotency-Key is without effect: the answer is the file itself"
# For headers that logs and the database repeat.
_VISIBLE = {"pattern": r"^[\x21-\x7e]{1,128}$"}


class AnsweringRoute(APIRoute):
    """A route whose errors become answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the base's handler so that its errors are answered."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await answer_errors(handle(request), f"{request.method} {self.path}")

        return answer


async def answer_errors(handling: Coroutine[Any, Any, Response], operation: str) -> Response:
    """Return the route's answer, or its error's; log an error that the answer does not explain, raise HTTPException."""
    try:
        return await handling
    except HTTPException:
        raise
    except RequestValidationError as error:  # of parameters and headers; bodies are our own
        return error_response(request_error(error.errors()[0]))
    except Exception as error:
        if not is_explained(error):
            logger.exception("%s failed", operation)
        return error_response(error)


def new_router() -> APIRouter:
    """Return an empty router of :class:`AnsweringRoute`."""
    return APIRouter(route_class=AnsweringRoute)


@dataclass(frozen=True)
class Call:
    """One request, the service that it is for, and the caller."""

    request: Request
    service: Service
    caller: Caller

    async def fields(self, model: type[B], reserved: Reservation) -> NamedFields[B]:
        """Read the request's body.

        Raises:
            BodyError: it cannot be read.
            RequestError: a field is unknown.
            OverloadedError: there is no memory for it now.
        """
        fields = await read_fields(self.request, self.service.http.max_body_bytes, reserved, model.lists())
        # In threads: texts and base64 of the largest files take seconds.
        return await run_in_thread(NamedFields.of, fields, model)

    async def body(self, model: type[R], reserved: Reservation) -> ParsedBody[R]:
        """Read and check the request's body, and fetch the files that it names by URL.

        Raises:
            BodyError, OverloadedError: as :meth:`fields`.
            RequestError: a field is unknown or has a wrong value, or a file cannot be fetched.
        """
        named = await self.fields(model, reserved)
        if self.service.fetch_file is not None:
            named = replace(named, values=await fetch_remote(named.values, self.service.fetch_file, reserved))
        return await run_in_thread(parse_body, named, self.service.rules_for(self.caller))

    def options(
        self,
        options: SubmitOptions,
        request_id: str | None,
        idempotency_key: str | None = None,
        *,
        no_replay: str | None = None,
    ) -> SubmitOptions:
        """Complete a body's options with the caller and the headers; ``no_replay`` is a key without effect."""
        return replace(
            options,
            request_id=request_id,
            owner=self.caller.owner,
            classes=self.caller.classes,
            limits=self.caller.limits,
            idempotency_key=idempotency_key,
            warnings=options.warnings if no_replay is None else (_NO_REPLAY, *options.warnings),
        )


def service_of(request: Request) -> Service:
    """Return the service of the application."""
    service: Service = request.app.state.get_service()
    return service


async def open_call(request: Request) -> Call:
    """Make the call of a request; raise RequestError for a query parameter that is unknown or given twice."""
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    seen = set()
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise unknown_name(name, value, known, "query parameter")
        if name in seen:
            raise RequestError(name, start_of(value), "given once")
        seen.add(name)
    return Call(request, service_of(request), request.scope[CALLER])


def _visible(name: str) -> AfterValidator:
    """Return a validator for a header that logs and the database repeat."""

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_VISIBLE["pattern"], value, re.ASCII):
            raise BodyError(400, "invalid_header", f"{name} must be 1 to 128 visible ASCII characters")
        return value

    return AfterValidator(check)


CurrentCall = Annotated[Call, Depends(open_call)]
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
NoReplay = Annotated[str | None, Header(alias="Idempotency-Key", include_in_schema=False), _visible("idempotency-key")]
"""The idempotency key of a request that it has no effect on."""
