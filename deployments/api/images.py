"""Route of images."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.bodies import image_body
from deployments.api.call import Call, routes
from deployments.api.exchange import Exchange, answered
from deployments.api.fields import Endpoint
from deployments.api.media_answer import images_answer
from deployments.api.videos import service_headers

router = routes()


@router.post(Endpoint.IMAGES)
async def create_images(request: Request) -> Response:
    """Make n images from a prompt, one after the other; image i has the seed + i."""
    call = Call.of(request)
    service = call.service

    async def work(exchange: Exchange) -> Response:
        with service.room.hold() as held:
            body = image_body(await call.body(Endpoint.IMAGES, held), service.rules(call.caller))
            asked = call.asked(body.wishes, exchange.request_id)
            await exchange.ask(body.requests[0], asked)
        with service.room.hold() as held:
            answer = await images_answer(exchange, body, asked, held, service.media)
        answer.headers.update(service_headers(service.model.name, body.wishes.warnings))
        return answer

    return await answered(request, service.streaming, service.http.request_timeout_s, work)
