"""One call of the API: its request, service and caller, and the parameters that routes share.

Every error of a route becomes an answer here.
"""

from __future__ import annotations

import logging
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
from deployments.api.bodies import B, ParsedBody, name_fields, request_error, unknown_name
from deployments.api.body_limit import VISIBLE, check_visible, read_fields
from deployments.api.errors import error_response, is_explained
from deployments.api.media_fields import fetch_remote
from deployments.api.memory_budget import Reservation
from deployments.api.service import Service
from deployments.jobs.job import Job, SubmitOptions
from deployments.media.layout import JOB_ID
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

CALLER = "cosmos3.caller"
"""Key of the caller in a request's scope."""

_MAX_SHOWN_CHARS = 200


class AnsweringRoute(APIRoute):
    """A route whose errors become answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the base with its errors answered."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await answer_errors(handle(request), f"{request.method} {self.path}")

        return answer


async def answer_errors(handling: Coroutine[Any, Any, Response], what: str) -> Response:
    """Return an answer, or the one for the error that is raised instead; what it says of the inside goes to the log.

    Args:
        handling: of the request.
        what: is asked for, for the log.

    Raises:
        HTTPException: the framework's own.
    """
    try:
        return await handling
    except HTTPException:
        raise
    except RequestValidationError as error:  # of parameters and headers; bodies are read by us
        return error_response(request_error(error.errors()[0], ()))
    except Exception as error:
        if not is_explained(error):
            logger.exception("%s failed", what)
        return error_response(error)


def routes() -> APIRouter:
    """Return an empty router of such routes."""
    return APIRouter(route_class=AnsweringRoute)


@dataclass(frozen=True)
class Call:
    """One request, the service that it is for, and the caller.

    Attributes:
        request: that came.
        service: that it is for.
        caller: whose it is.
    """

    request: Request
    service: Service
    caller: Caller

    async def job(self, video_id: str) -> Job:
        """Return the caller's job of an id.

        Raises:
            ApiError: 404, there is none; somebody else's is none.
            JobsError: the database cannot be used.
        """
        return await self.service.jobs.get(video_id, self.caller.owner)

    async def body(self, model: type[B], reserved: Reservation) -> ParsedBody[B]:
        """Read the request's body, files of other servers included.

        Args:
            model: of the body.
            reserved: memory for it.

        Raises:
            BodyError: it cannot be read.
            RequestError: a field is unknown or has a value that it does not take, or a file cannot be had.
            OverloadedError: there is no memory for it now.
        """
        service = self.service
        fields = await read_fields(self.request, service.http.max_body_bytes, reserved)
        # In threads: texts and base64 of the largest files take seconds.
        named = await run_in_thread(name_fields, fields, model)
        if service.remote_media is not None:
            named = replace(named, values=await fetch_remote(named.values, service.remote_media, reserved))
        return await run_in_thread(named.parse, service.rules(self.caller))

    def options(
        self, options: SubmitOptions, request_id: str | None, idempotency_key: str | None = None
    ) -> SubmitOptions:
        """Complete a body's options by what the request says beside it."""
        return replace(
            options,
            request_id=request_id,
            owner=self.caller.owner,
            classes=self.caller.classes,
            limits=self.caller.limits,
            idempotency_key=idempotency_key,
        )


def service_of(request: Request) -> Service:
    """Return the service that a request is for."""
    service: Service = request.app.state.get_service()
    return service


async def open_call(request: Request) -> Call:
    """Return the call that a request is.

    Raises:
        RequestError: it has a query parameter that the route does not have, or one twice.
    """
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    seen = set()
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise unknown_name(name, value, known, "query parameter")
        if name in seen:
            raise RequestError(name, value[:_MAX_SHOWN_CHARS], "given once")
        seen.add(name)
    return Call(request, service_of(request), request.scope[CALLER])


def _visible(name: str) -> AfterValidator:
    return AfterValidator(lambda value: None if value is None else check_visible(name, value))


CurrentCall = Annotated[Call, Depends(open_call)]
VideoId = Annotated[str, Path(json_schema_extra={"pattern": f"^{JOB_ID.pattern}$"})]
RequestId = Annotated[
    str | None,
    Header(alias="X-Request-Id", description="the caller's name for it, for logs", json_schema_extra=VISIBLE),
    _visible("x-request-id"),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="sent again with the same request, it gives the same job",
        json_schema_extra=VISIBLE,
    ),
    _visible("idempotency-key"),
]
NoReplay = Annotated[str | None, Header(alias="Idempotency-Key", include_in_schema=False), _visible("idempotency-key")]
"""The idempotency key of a request that it has no effect on."""
