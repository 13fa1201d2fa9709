"""Route of images."""

from __future__ import annotations

from dataclasses import replace

from starlette.responses import Response

from deployments.api.answers import Images
from deployments.api.call import CurrentCall, NoReplay, RequestId, routes
from deployments.api.exchange import Exchange, answered
from deployments.api.fields import Endpoint, ImageBody
from deployments.api.media_answer import all_warnings, images_answer, service_headers
from deployments.api.openapi import made_files, responses, takes

router = routes()


@router.post(
    Endpoint.IMAGES,
    responses=responses({200: made_files(Images, "application/zip")}, has_body=True),
    openapi_extra=takes(ImageBody),
)
async def create_images(call: CurrentCall, no_replay: NoReplay = None, request_id: RequestId = None) -> Response:
    """Make n images from a prompt, one after the other; image i has the seed + i."""
    service = call.service

    async def work(exchange: Exchange) -> Response:
        with service.room.hold() as reserved:
            body = await call.body(ImageBody, reserved)
            warnings = all_warnings(no_replay, body.options)
            options = call.options(replace(body.options, warnings=warnings), exchange.request_id)
            with body.origins.restored():
                await exchange.ask(body.requests[0], options)
        with service.room.hold() as reserved:
            answer = await images_answer(exchange, body, options, reserved, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, warnings))
        return answer

    return await answered(service.streaming, request_id, service.http.request_timeout_s, work)
