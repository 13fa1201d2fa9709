"""Images: made one after the other while the client waits; answered as JSON, as the file, or as a zip of several."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from starlette.responses import JSONResponse, Response

from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.api.bodies import ParsedBody
from deployments.api.body_reader import Reservation
from deployments.api.call import CurrentCall, NoReplay, RequestId, new_router
from deployments.api.exchange import Exchange
from deployments.api.fields import B64_JSON, Endpoint, ImageBody
from deployments.api.media_answer import Base64, file_answer, read_file, round_seconds, service_headers, to_base64
from deployments.api.openapi import describe_files, responses, takes
from deployments.api_model import ApiModel
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Count, JobId, Seconds
from deployments.media.store import MediaStore
from deployments.messages import Finished

router = new_router()


class Image(ApiModel):
    """One of several images."""

    id: JobId
    b64_json: Base64
    url: None = None
    revised_prompt: None = None
    seed: Count
    frames_sha256: str


class ImageMetrics(ApiModel):
    """Durations of the images."""

    stage_durations: Mapping[str, Seconds]


class Images(ApiModel):
    """Images that were made while the client waited."""

    created: Count
    data: tuple[Image, ...]
    output_format: str
    size: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9]+x[0-9]+$"})]
    metrics: ImageMetrics


@router.post(
    Endpoint.IMAGES,
    responses=responses({200: describe_files(Images, "application/zip")}, has_body=True),
    openapi_extra=takes(ImageBody),
)
async def create_images(call: CurrentCall, no_replay: NoReplay = None, request_id: RequestId = None) -> Response:
    """Make n images from a prompt, one after the other; image i has the seed + i."""
    service = call.service
    async with Exchange.open(service.streaming, request_id, service.http.request_timeout_s) as exchange:
        with service.room.hold() as reserved:
            body = await call.body(ImageBody, reserved)
            options = call.options(body.options, exchange.request_id, no_replay=no_replay)
            with body.origins.restore_names():
                await exchange.submit(body.requests[0], options)
        with service.room.hold() as reserved:
            answer = await images_answer(exchange, body, options, reserved, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, options.warnings))
        return answer


async def images_answer(
    exchange: Exchange, body: ParsedBody[ImageBody], options: SubmitOptions, reserved: Reservation, media: MediaStore
) -> Response:
    """Answer with the images of a body; the Director already works on the first."""
    is_json = body.fields.response_format == B64_JSON
    event = await exchange.wait_for_end()
    if not is_json and len(body.requests) == 1:
        exchange.cancel()
        return await file_answer(event, media)
    made = [(event, await read_file(event, reserved, media))]
    for request in body.requests[1:]:
        event = await exchange.submit_next(request, options)
        made.append((event, await read_file(event, reserved, media)))
    exchange.cancel()
    stages = dict.fromkeys(stage for event, _ in made for stage in event.stage_seconds)
    stage_durations = round_seconds({it: sum(event.stage_seconds.get(it, 0.0) for event, _ in made) for it in stages})
    if not is_json:
        seeds = ",".join(str(event.seed) for event, _ in made)
        headers = {"x-seed": seeds, "x-stage-durations": json.dumps(stage_durations)}
        return Response(_zip(made), media_type="application/zip", headers=headers)
    answer = Images(
        created=int(time.time()),
        data=tuple(
            Image(id=event.job_id, b64_json=to_base64(data), seed=event.seed, frames_sha256=event.frames_sha256)
            for event, data in made
        ),
        output_format=body.fields.output_format,
        size=f"{event.width}x{event.height}",
        metrics=ImageMetrics(stage_durations=stage_durations),
    )
    return JSONResponse(answer.as_json())


def _zip(made: Sequence[tuple[Finished, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # images are compressed already
        for index, (event, data) in enumerate(made):
            archive.writestr(f"{index}{SUFFIXES[event.media_type]}", data)
    return file.getvalue()
