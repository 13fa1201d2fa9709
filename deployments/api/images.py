"""Route of images."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.bodies import image_body
from deployments.api.call import Call, routes
from deployments.api.exchange import Exchange, answered
from deployments.api.fields import Endpoint
from deployments.api.media_answer import images_answer
from deployments.api.videos import service_headers, told_no_replay
from deployments.api.written import as_written

router = routes()


@router.post(Endpoint.IMAGES)
async def create_images(request: Request) -> Response:
    """Make n images from a prompt, one after the other; image i has the seed + i."""
    call = Call.of(request)
    service = call.service

    async def work(exchange: Exchange) -> Response:
        no_replay = told_no_replay(request.headers)
        with service.room.hold() as held:
            body = await call.body(Endpoint.IMAGES, held, image_body)
            warnings = (*no_replay, *body.wishes.warnings)
            asked = call.options(replace(body.wishes, warnings=warnings), exchange.request_id)
            with as_written(body.origins):
                await exchange.ask(body.requests[0], asked)
        with service.room.hold() as held:
            answer = await images_answer(exchange, body, asked, held, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, warnings))
        return answer

    return await answered(request, service.streaming, service.http.request_timeout_s, work)
