"""The OpenAPI document: FastAPI's own, with the bodies of requests and what depends on the service."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from cosmos3_core.media.file_kinds import SUFFIXES
from cosmos3_core.presets import LIMITS
from deployments.api.answers import Error
from deployments.api.body_limit import JSON, MAX_FIELDS, MAX_URLENCODED_BYTES, MULTIPART, URLENCODED
from deployments.api.field_types import Schema
from deployments.api.fields import BODIES, ImageBody, RemixBody, RequestBody, SyncBody, VideoBody, name_pattern
from deployments.api.service import Service
from deployments.jobs.video import Actions

Document = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

_KEY = "apiKey"
_ERRORS = {
    400: "the body or a header cannot be read, or a guardrail has stopped it",
    401: "no API key, or none that is valid",
    403: "a page of another origin, which may not call; or another name than this machine's own, without keys",
    404: "not found, or already deleted, or it is another key's",
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
_HEADERS = {
    "WWW-Authenticate": "Bearer",
    "ETag": "of these bytes",
    "Content-Range": "which bytes these are",
    "Retry-After": "seconds",
    "openai-poll-after-ms": "when to look again; of a job that has not ended",
    "X-Video-Id": "id of the job, by which the file can be had as long as it is kept",
    "X-Model": "name of the model",
    "X-Mode": "mode of the request",
    "X-Seed": "seed of the initial noise; of a zip one an image",
    "X-Frames-Sha256": "hash of the decoded frames",
    "X-Negative-Prompt": "where the negative prompt came from",
    "X-Inference-Time-S": "seconds",
    "X-Stage-Durations": "stage -> seconds, as JSON",
    "X-Notes": "what was changed on the way, as a JSON list",
    "X-Warnings": "fields that were accepted without effect, as a JSON list",
}
_NUMBERS = ("Retry-After", "openai-poll-after-ms")
_ERROR_HEADERS = {
    401: "WWW-Authenticate",
    409: "Retry-After",
    416: "Content-Range",
    429: "Retry-After",
    503: "Retry-After",
}
_OF_ALL = (401, 403, 422, 429, 503)
_OF_BODIES = (*_OF_ALL, 400, 408, 409, 413, 415, 504)
_FILE = {"schema": {"type": "string", "format": "binary"}}
_FILES = dict.fromkeys(SUFFIXES, _FILE)
_CLIP: Document = {"prompt": "a red car on a mountain road, seen from above", "size": "832x480", "num_frames": 93}
_EXAMPLES: dict[type[Any], Document] = {
    VideoBody: {**_CLIP, "seed": 7, "previews": 4},
    SyncBody: {**_CLIP, "seed": 7},
    ImageBody: {"prompt": _CLIP["prompt"], "size": "640x640", "n": 2},
    RemixBody: {"prompt": _CLIP["prompt"]},
}
# What can be done with a job from then on.
_LINKS: Document = {
    operation: {"operationId": operation, "parameters": {"video_id": "$response.body#/id"}}
    for operation in ("getVideo", "followVideo", "getVideoContent", "cancelVideo", "remixVideo", "deleteVideo")
}


def header_docs(*names: str) -> Document:
    """Return the description of an answer's headers."""
    return {
        name: {
            "description": _HEADERS[name],
            "schema": {"type": "integer", "minimum": 0} if name in _NUMBERS else {"type": "string"},
        }
        for name in names
    }


def responses(given: Responses, *errors: int, has_body: bool = False, is_open: bool = False) -> Responses:
    """Return the answers of an operation.

    Args:
        given: by status, those of its own.
        errors: statuses of others, beside those that all operations have.
        has_body: whether it takes a body.
        is_open: whether it needs no key, and is always answered.
    """
    general = () if is_open else _OF_BODIES if has_body else _OF_ALL
    refusals: Responses = {
        status: {
            "model": Error,
            "description": _ERRORS[status],
            "headers": header_docs(*([_ERROR_HEADERS[status]] if status in _ERROR_HEADERS else [])),
        }
        for status in sorted({*general, *errors} - set(given))
    }
    return given | refusals | {"default": {"model": Error, "description": "any other fault"}}


POLLED: Responses = {200: {"headers": header_docs("openai-poll-after-ms")}}
"""The answer with a job."""

ACCEPTED: Responses = {200: {**POLLED[200], "links": _LINKS}}
"""The answer with a new job."""


def takes(model: type[Any]) -> Document:
    """Return the description of an operation's body, for ``openapi_extra``; :func:`document` adds the schemas."""
    form = model.__name__ if model is RemixBody else f"{model.__name__}Form"
    schemas = {JSON: model.__name__, MULTIPART: form, URLENCODED: form}
    about = f"At most {MAX_FIELDS} fields. A URL-encoded form has no files and at most {MAX_URLENCODED_BYTES} bytes."
    content = {kind: {"schema": _ref(name), "example": _EXAMPLES[model]} for kind, name in schemas.items()}
    return {"requestBody": {"description": about, "required": True, "content": content}}


def conditional_headers() -> Document:
    """Return the description of the headers of RFC 9110, for ``openapi_extra``."""
    about = {
        "Range": "bytes=a-b; one range",
        "If-None-Match": "an ETag that the client has",
        "If-Range": "an ETag that Range is for",
    }
    schema = {"type": "string"}
    headers = [{"name": it, "in": "header", "description": text, "schema": schema} for it, text in about.items()]
    return {"parameters": headers}


def made_files(model: type[Any], *others: str) -> Document:
    """Return the answer with what was made: a file, or JSON.

    Args:
        model: of the JSON.
        others: media types beside those of files that are made.
    """
    headers = header_docs(*(name for name in _HEADERS if name.startswith("X-")))
    return {
        "model": model,
        "description": "what was made",
        "headers": headers,
        "content": _FILES | dict.fromkeys(others, _FILE),
    }


def content_answers(*, has_body: bool) -> Responses:
    """Return the answers with a job's content; those to HEAD have no body."""
    files = {"content": {**_FILES, "audio/mp4": _FILE}} if has_body else {}
    actions = {"model": Actions} if has_body else {}
    return {
        200: {"description": "the whole", "headers": header_docs("ETag"), **files, **actions},
        **(
            {206: {"description": "a part", "headers": header_docs("ETag", "Content-Range"), **files}}
            if has_body
            else {}
        ),
        304: {"description": "the client has it", "headers": header_docs("ETag")},
    }


def document(app: FastAPI, service: Service, root_path: str = "") -> Document:
    """Return the document of a service; made once, which takes a good part of a second.

    Args:
        app: has the operations, and keeps the document.
        service: it names its model, and what its configuration allows.
        root_path: that comes before all paths.
    """
    if app.state.document is None:
        app.state.document = _complete(app.openapi(), service)
    return {**app.state.document, "servers": [{"url": root_path or "/"}]}


def _complete(document: Document, service: Service) -> Document:
    components = document["components"]
    return {
        **document,
        "security": [{_KEY: []}] if service.auth is not None else [],
        "components": {
            **components,
            "schemas": {**components["schemas"], **_bodies(service)},
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _bodies(service: Service) -> dict[str, Schema]:
    """Return name -> schema of everything that is sent."""
    schemas = {RemixBody.__name__: RemixBody.model_json_schema()}
    for model in BODIES.values():
        name = model.__name__
        extra, body = _body(model, service), _body(model, service)
        del extra["properties"]["extra_params"]
        body["properties"]["extra_params"]["anyOf"][0]["anyOf"][0] = _ref(f"{name}Extra")
        schemas |= {f"{name}Extra": extra, name: body, f"{name}Form": _body(model, service, is_form=True)}
    return schemas


def _body(model: type[RequestBody], service: Service, *, is_form: bool = False) -> Schema:
    """Return the schema of a model, with other servers' names and the values that the service allows."""
    properties: dict[str, Schema] = model.model_json_schema(by_alias=False)["properties"]
    guardrails = [*([True] if service.has_guardrails else []), *([False] if service.may_disable_guardrails else [])]
    values = {"model": [service.model.id], "service_class": [*service.classes], "guardrails": guardrails}
    for name, schema in properties.items():
        del schema["title"]
        if name in values:
            schema["anyOf"][0] = {"type": schema["anyOf"][0]["type"], "enum": values[name]}
        if is_form:
            schema |= model.type_of(name).form_schema or schema.pop("anyOf")[0]
    for alias, name in model.aliases().items():
        properties[alias] = {**properties[name], "description": f"the same as {name}"}
    unused: Schema = {"type": "string", "maxLength": LIMITS.max_prompt_chars} if is_form else {}
    refused: Schema = {"not": {}} if is_form else {"type": "null"}
    properties |= {name: {**unused, "description": f"without effect: {why}"} for name, why in model.no_effect.items()}
    properties |= {name: {**refused, "description": f"not offered: {why}"} for name, why in model.not_offered.items()}
    return {
        "type": "object",
        "patternProperties": {f"^{name_pattern(it)}$": properties.pop(it) for it in [*properties] if "*" in it},
        "properties": properties,
        "additionalProperties": False,
        "maxProperties": MAX_FIELDS,
    }
