"""One call of the API: what came, whose it is, and what it may be about. Every error of a route becomes an answer."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cosmos3_core.errors import RequestError
from deployments.api.auth import Caller
from deployments.api.bodies import BodyRules, Wishes
from deployments.api.body_limit import read_fields
from deployments.api.errors import error_response, is_explained
from deployments.api.fields import Endpoint
from deployments.api.given_fields import Given, read_given
from deployments.api.given_media import with_fetched
from deployments.api.memory_budget import Reservation
from deployments.api.service import Service
from deployments.jobs.job import Job, SubmitOptions
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

CALLER = "cosmos3.caller"
"""Key of the caller in a request's scope."""

_MAX_SHOWN_CHARS = 200
T = TypeVar("T")


class AnsweringRoute(APIRoute):
    """A route whose errors become answers; what they say of the inside goes to the log."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See the base."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException:
                raise
            except Exception as error:
                if not is_explained(error):
                    logger.exception("%s %s failed", request.method, self.path)
                return error_response(error)

        return answer


def routes() -> APIRouter:
    """An empty router of such routes."""
    return APIRouter(route_class=AnsweringRoute)


@dataclass(frozen=True)
class Call:
    """See the module.

    Attributes:
        request: that came.
        service: that it is for.
        caller: whose it is.
        query: its query parameters.
    """

    request: Request
    service: Service
    caller: Caller
    query: dict[str, str]

    @classmethod
    def of(cls, request: Request, *known: str) -> Call:
        """Of a request.

        Args:
            request: that came.
            known: query parameters that the endpoint has.

        Raises:
            RequestError: another query parameter, or one given twice.
        """
        return cls(request, service_of(request), request.scope[CALLER], _query(request, known))

    async def job(self, video_id: str) -> Job:
        """The caller's job of an id.

        Raises:
            ApiError: 404, there is none; somebody else's is none.
            JobsError: the database cannot be used.
        """
        return await self.service.jobs.get(video_id, self.caller.owner)

    async def body(self, endpoint: Endpoint, held: Reservation, meant: Callable[[Given, BodyRules], T]) -> T:
        """What its body asks for, files of other servers included.

        Args:
            endpoint: whose fields it has.
            held: room for the body.
            meant: what fields ask for; called in a thread, as texts and base64 of the largest files take seconds.

        Raises:
            BodyError: it cannot be read.
            RequestError: it has a field that there is not, or a file that cannot be had, or what ``meant`` raises.
            OverloadedError: there is no room for it now.
        """
        service = self.service
        fields = await read_fields(self.request, service.http.max_body_bytes, held)
        given = await run_in_thread(read_given, fields, endpoint)
        if service.remote_media is not None:
            given = replace(given, values=await with_fetched(given.values, service.remote_media, held))
        return await run_in_thread(meant, given, service.rules(self.caller))

    def options(self, wishes: Wishes, request_id: str, idempotency_key: str | None = None) -> SubmitOptions:
        """What the Director is told beside a request."""
        return SubmitOptions(
            request_id=request_id,
            owner=self.caller.owner,
            service_class=wishes.service_class,
            classes=self.caller.classes,
            limits=self.caller.limits,
            idempotency_key=idempotency_key,
            previews=wishes.previews,
            warnings=wishes.warnings,
            skip_guardrails=wishes.skip_guardrails,
        )


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service: Service = request.app.state.get_service()
    return service


def _query(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            near = difflib.get_close_matches(name[:_MAX_SHOWN_CHARS], known, n=1)
            allowed = f"left out: unknown query parameter; known are {', '.join(known) or 'none'}"
            raise RequestError(name, value[:_MAX_SHOWN_CHARS], allowed, f"Did you mean {near[0]}?" if near else "")
        if name in given:
            raise RequestError(name, value[:_MAX_SHOWN_CHARS], "given once")
        given[name] = value
    return given
