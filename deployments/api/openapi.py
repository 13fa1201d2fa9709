"""The OpenAPI document: every endpoint, what it takes, all that it may answer. Written by hand, held true by tests."""

from __future__ import annotations

from typing import Any

from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.api.body_limit import MAX_FIELDS, MAX_URLENCODED_BYTES
from deployments.api.fields import Endpoint
from deployments.api.schemas import JOB_ID_PATTERN, answers, bodies, body_name, ref
from deployments.api.service import Service

Document = dict[str, Any]

_JSON, _MULTIPART, _URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
_KEY = "apiKey"
_VISIBLE = r"^[\x21-\x7e]{1,128}$"

_ERRORS = {
    400: "the body or a header cannot be read, or a guardrail has stopped it",
    401: "no API key, or none that is valid",
    403: "a page of another origin, which may not call; or another name than this machine's own, without keys",
    404: "there is none, or not any more, or it is another key's",
    408: "the body did not come in time",
    409: "not now: there is nothing of it yet, it was stopped, or the idempotency key was used for another request",
    410: "there will be no file, or it is not kept any more",
    413: "the body is too large",
    415: "a body of another type",
    416: "nothing of the range is there",
    422: "a field, parameter or header has a value that it cannot have, or asks for what is not offered",
    429: "a bound is reached",
    503: "not ready, being stopped, or a part of it has failed",
    504: "not done in the time that it may take",
}
_OF_ALL = (401, 403, 422, 429, 503)
_OF_BODIES = (*_OF_ALL, 400, 408, 409, 413, 415, 504)
_COMEBACKS = (409, 429, 503)


def document(service: Service, root_path: str = "") -> Document:
    """The document of a service.

    Args:
        service: it names its model, and what its configuration allows.
        root_path: that comes before all paths.
    """
    about = "Videos, images, sound and actions with NVIDIA's Cosmos3. Every answer has an x-request-id."
    return {
        "openapi": "3.1.0",
        "info": {"title": "cosmos3-serve", "version": "1", "description": about},
        "servers": [{"url": root_path or "/"}],
        "security": [{_KEY: []}] if service.auth is not None else [],
        "paths": {**_making_paths(), **_video_paths(), **_service_paths()},
        "components": {
            "schemas": {**bodies(service), **answers()},
            "responses": {f"Error{status}": _error(status) for status in _ERRORS},
            "headers": _headers(),
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _making_paths() -> Document:
    return {
        Endpoint.VIDEOS: {
            "post": _operation(
                "createVideo",
                "Accept a request as a job, which is run whatever becomes of its caller.",
                {200: {**_video(), "links": _LINKS}},
                *_OF_BODIES,
                parameters=[_REQUEST_ID, _IDEMPOTENCY_KEY],
                body=_body(Endpoint.VIDEOS),
            ),
            "get": _operation(
                "listVideos",
                "The caller's jobs, in pages.",
                {200: _json("VideoList")},
                *_OF_ALL,
                parameters=[
                    _query("after", {"type": "string", "pattern": JOB_ID_PATTERN}, "the last one of the page before"),
                    _query("limit", {"type": "integer", "minimum": 0, "maximum": 100, "default": 20}, "of the page"),
                    _query("order", {"enum": ["asc", "desc"], "default": "desc"}, "by the time of acceptance"),
                ],
            ),
        },
        Endpoint.SYNC: {
            "post": _operation(
                "createVideoAndWait",
                "Make what is asked for and answer with it: the file, or JSON where actions are generated. Who leaves "
                "stops it.",
                {200: _made({_JSON: ref("GeneratedActions")})},
                *_OF_BODIES,
                parameters=[_REQUEST_ID],
                body=_body(Endpoint.SYNC),
            )
        },
        Endpoint.IMAGES: {
            "post": _operation(
                "createImages",
                "Make n images from a prompt, one after the other; image i has the seed + i.",
                {200: _made({_JSON: ref("Images"), "application/zip": _FILE})},
                *_OF_BODIES,
                parameters=[_REQUEST_ID],
                body=_body(Endpoint.IMAGES),
            )
        },
    }


def _video_paths() -> Document:
    one = "/v1/videos/{video_id}"
    return {
        one: {
            "get": _operation(
                "getVideo",
                "A job as it stands; one that has failed as well.",
                {200: _video()},
                *_OF_ALL,
                404,
                parameters=[_VIDEO_ID],
            ),
            "delete": _operation(
                "deleteVideo",
                "Stop and forget a job, its files too.",
                {200: _json("VideoDeleted")},
                *_OF_ALL,
                404,
                parameters=[_VIDEO_ID],
            ),
        },
        f"{one}/cancel": {
            "post": _operation(
                "cancelVideo",
                "Stop a job, which then has failed with the code cancelled; one that has ended stays as it is.",
                {200: _video()},
                *_OF_ALL,
                404,
                parameters=[_VIDEO_ID],
            )
        },
        f"{one}/remix": {
            "post": _operation(
                "remixVideo",
                "Accept an earlier job's request again, with the same seed and fields and another prompt.",
                {200: {**_video(), "links": _LINKS}},
                *_OF_BODIES,
                404,
                parameters=[_VIDEO_ID, _REQUEST_ID, _IDEMPOTENCY_KEY],
                body=_contents({kind: ref("Remix") for kind in (_JSON, _MULTIPART, _URLENCODED)}),
            )
        },
        f"{one}/content": {
            method: _operation(
                f"{method}VideoContent",
                "What a job has made; the file from its first fragment on, and as it grows.",
                {
                    200: _content(has_body=method == "get"),
                    **({206: _range()} if method == "get" else {}),
                    304: {"description": "the client has it", "headers": _refs("ETag")},
                },
                *_OF_ALL,
                404,
                409,
                410,
                416,
                parameters=[_VIDEO_ID, _VARIANT, *_CONDITIONS],
            )
            for method in ("get", "head")
        },
        f"{one}/events": {
            "get": _operation(
                "followVideo",
                _EVENTS,
                {
                    200: {"description": "events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
                    204: {"description": "the client has the last one"},
                },
                *_OF_ALL,
                404,
                parameters=[_VIDEO_ID, _header("Last-Event-ID", "^[0-9]{0,18}$", "begin behind this one")],
            )
        },
    }


def _service_paths() -> Document:
    return {
        "/v1/models": {
            "get": _operation("listModels", "The one model that is served.", {200: _json("Models")}, *_OF_ALL)
        },
        "/health": {"get": _operation("health", "The process is up.", {200: _json("Health")}, is_open=True)},
        "/ready": {
            "get": _operation(
                "ready",
                "Whether every stage has a running replica.",
                {200: _json("Ready"), 503: {**_json("NotReady"), "headers": _refs("Retry-After")}},
                is_open=True,
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "Numbers for Prometheus.",
                {200: {"description": "numbers", "content": {"text/plain": {"schema": {"type": "string"}}}}},
                *(status for status in _OF_ALL if status != 422),
            )
        },
        "/openapi.json": {
            "get": _operation(
                "openapi",
                "This document.",
                {200: {"description": "the document", "content": {_JSON: {"schema": {"type": "object"}}}}},
                is_open=True,
            )
        },
    }


_PROMPT = "a red car on a mountain road, seen from above"
_CLIP: Document = {"prompt": _PROMPT, "size": "832x480", "num_frames": 93, "seed": 7}
_EXAMPLES: dict[Endpoint, Document] = {
    Endpoint.VIDEOS: {**_CLIP, "previews": 4},
    Endpoint.SYNC: _CLIP,
    Endpoint.IMAGES: {"prompt": _PROMPT, "size": "640x640", "n": 2},
}
_FILE: Document = {"type": "string", "format": "binary"}
# What can be done with a job from then on.
_LINKS: Document = {
    operation_id: {"operationId": operation_id, "parameters": {"video_id": "$response.body#/id"}}
    for operation_id in ("getVideo", "followVideo", "getVideoContent", "cancelVideo", "remixVideo", "deleteVideo")
}
_BODIES = (
    f"At most {MAX_FIELDS} fields. A URL-encoded form carries no files and has at most {MAX_URLENCODED_BYTES} bytes."
)
_EVENTS = (
    "Server-sent events: queued {position, eta_s}, started {attempt}, "
    "step {step, num_steps, sigma, eta_s, step_s, pid}, preview {step, sigma, media_type, b64_json}, "
    "previews_off {reason}, file {media_type}: the content can be read, decoding {chunk, num_frames}, "
    "retried {stage, attempt, from_step}; and as the last one completed, failed or cancelled with the whole video, "
    "or deleted. Those with an id are history, which Last-Event-ID goes on with."
)


def _query(name: str, schema: Document, about: str) -> Document:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": about}


def _header(name: str, pattern: str, about: str) -> Document:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": about}


_VIDEO_ID: Document = {
    "name": "video_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": JOB_ID_PATTERN},
}
_REQUEST_ID = _header("X-Request-Id", _VISIBLE, "the caller's name for it, for logs")
_IDEMPOTENCY_KEY = _header("Idempotency-Key", _VISIBLE, "sent again with the same request, it gives the same job")
_VARIANT = _query(
    "variant",
    {"enum": ["video", "thumbnail", "spritesheet", "audio", "action"], "default": "video"},
    "the file itself (an image or sound where that was asked for), pictures or the sound of it, or generated actions",
)
_CONDITIONS = (
    _header("Range", ".*", "bytes=a-b; one range"),
    _header("If-None-Match", ".*", "an ETag that the client has"),
    _header("If-Range", ".*", "an ETag that Range is for"),
)


def _headers() -> Document:
    texts = {
        "WWW-Authenticate": "Bearer",
        "ETag": "of these bytes",
        "Content-Range": "which bytes these are",
        "X-Video-Id": "of the job, by which the file can be had as long as it is kept",
        "X-Model": "that made it",
        "X-Mode": "that it was made in",
        "X-Seed": "that it was made with; of a zip one an image",
        "X-Frames-Sha256": "of the decoded frames",
        "X-Negative-Prompt": "where it came from",
        "X-Inference-Time-S": "seconds",
        "X-Stage-Durations": "stage -> seconds, as JSON",
        "X-Notes": "what was changed on the way, as a JSON list",
        "X-Warnings": "fields that were accepted without effect, as a JSON list",
    }
    numbers = {"Retry-After": "seconds", "openai-poll-after-ms": "when to look again; of a job that has not ended"}
    return {
        **{name: {"schema": {"type": "string"}, "description": about} for name, about in texts.items()},
        **{
            name: {"schema": {"type": "integer", "minimum": 0}, "description": about} for name, about in numbers.items()
        },
    }


def _refs(*names: str) -> Document:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error(status: int) -> Document:
    headers = ("WWW-Authenticate",) if status == 401 else ("Retry-After",) if status in _COMEBACKS else ()
    if status == 416:
        headers = ("Content-Range",)
    return {
        "description": _ERRORS[status],
        "headers": _refs(*headers),
        "content": {_JSON: {"schema": ref("Error")}},
    }


def _operation(
    operation_id: str,
    about: str,
    given: dict[int, Document],
    *errors: int,
    parameters: list[Document] | None = None,
    body: Document | None = None,
    is_open: bool = False,
) -> Document:
    responses: Document = {str(status): response for status, response in given.items()}
    responses |= {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted(errors)}
    responses["default"] = {"description": "any other fault", "content": {_JSON: {"schema": ref("Error")}}}
    operation: Document = {"operationId": operation_id, "summary": about, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"description": _BODIES, "required": True, **body}
    if is_open:
        operation["security"] = []
    return operation


def _contents(schemas: dict[str, Document]) -> Document:
    return {"content": {kind: {"schema": schema} for kind, schema in schemas.items()}}


def _body(endpoint: Endpoint) -> Document:
    form = ref(body_name(endpoint, is_form=True))
    body = _contents({_JSON: ref(body_name(endpoint, is_form=False)), _MULTIPART: form, _URLENCODED: form})
    for content in body["content"].values():
        content["example"] = _EXAMPLES[endpoint]
    return body


def _json(name: str) -> Document:
    return {"description": name, **_contents({_JSON: ref(name)})}


def _video() -> Document:
    return {**_json("Video"), "headers": _refs("openai-poll-after-ms")}


def _made(others: dict[str, Document]) -> Document:
    names = ("X-Video-Id", "X-Model", "X-Mode", "X-Seed", "X-Frames-Sha256", "X-Negative-Prompt")
    more = ("X-Inference-Time-S", "X-Stage-Durations", "X-Notes", "X-Warnings")
    return {
        "description": "what was made",
        "headers": _refs(*names, *more),
        **_contents({**dict.fromkeys(SUFFIXES, _FILE), **others}),
    }


def _content(*, has_body: bool) -> Document:
    told: Document = {"description": "the whole", "headers": _refs("ETag")}
    if has_body:
        told |= _contents({**dict.fromkeys((*SUFFIXES, "audio/mp4"), _FILE), _JSON: ref("Actions")})
    return told


def _range() -> Document:
    return {
        "description": "a part",
        "headers": _refs("ETag", "Content-Range"),
        **_contents(dict.fromkeys((*SUFFIXES, "audio/mp4"), _FILE)),
    }
