"""The OpenAPI document: FastAPI's own, with the bodies of requests and what depends on the service."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from cosmos3_core.media.file_kinds import SUFFIXES
from cosmos3_core.presets import LIMITS
from deployments.api.body_reader import MAX_FIELDS, MAX_URLENCODED_BYTES, MULTIPART, URLENCODED
from deployments.api.call import Error
from deployments.api.field_types import Schema
from deployments.api.fields import BODIES, Body, ImageBody, RemixBody, SyncBody, VideoBody, name_pattern
from deployments.api.service import Service
from deployments.api_model import JSON
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
_ERROR_HEADERS = {401: "WWW-Authenticate", 416: "Content-Range", **dict.fromkeys((409, 429, 503), "Retry-After")}
HEADERS = {
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
"""Name -> description, of answers' headers."""

_INTEGER_HEADERS = ("Retry-After", "openai-poll-after-ms")
_STATUSES = (401, 403, 422, 429, 503)
_STATUSES_OF_BODIES = (*_STATUSES, 400, 408, 409, 413, 415, 504)
_FILE = {"schema": {"type": "string", "format": "binary"}}
_FILES = dict.fromkeys(SUFFIXES, _FILE)
_CLIP: Document = {"prompt": "a red car on a mountain road, seen from above", "size": "832x480", "num_frames": 93}
_EXAMPLES: dict[type[Body], Document] = {
    VideoBody: {**_CLIP, "seed": 7, "previews": 4},
    SyncBody: {**_CLIP, "seed": 7},
    ImageBody: {"prompt": _CLIP["prompt"], "size": "640x640", "n": 2},
    RemixBody: {"prompt": _CLIP["prompt"]},
}
# What can be done with a new job.
_LINKS: Document = {
    operation: {"operationId": operation, "parameters": {"video_id": "$response.body#/id"}}
    for operation in ("getVideo", "followVideo", "getVideoContent", "cancelVideo", "remixVideo", "deleteVideo")
}


def header_docs(*names: str) -> Document:
    """Return the description of an answer's headers."""
    integer = {"type": "integer", "minimum": 0}
    return {
        name: {"description": HEADERS[name], "schema": integer if name in _INTEGER_HEADERS else {"type": "string"}}
        for name in names
    }


def responses(own: Responses, *errors: int, has_body: bool = False, is_open: bool = False) -> Responses:
    """Return the answers of an operation: its own, some errors, and those that all operations have.

    An open operation has only the errors that it names.
    """
    general = () if is_open else _STATUSES_OF_BODIES if has_body else _STATUSES
    refusals: Responses = {
        status: {
            "model": Error,
            "description": _ERRORS[status],
            "headers": header_docs(*filter(None, [_ERROR_HEADERS.get(status)])),
        }
        for status in sorted({*general, *errors} - set(own))
    }
    return own | refusals | {"default": {"model": Error, "description": "any other fault"}}


POLLED: Responses = {200: {"headers": header_docs("openai-poll-after-ms")}}
"""The answer with a job."""

ACCEPTED: Responses = {200: {**POLLED[200], "links": _LINKS}}
"""The answer with a new job."""


def describe_body(model: type[Body]) -> Document:
    """Return the description of an operation's body, for ``openapi_extra``; :func:`make_document` adds the schemas."""
    schemas = {JSON: model.__name__, MULTIPART: f"{model.__name__}Form", URLENCODED: f"{model.__name__}Form"}
    about = f"At most {MAX_FIELDS} fields. A URL-encoded form has no files and at most {MAX_URLENCODED_BYTES} bytes."
    content = {kind: {"schema": _ref(name), "example": _EXAMPLES[model]} for kind, name in schemas.items()}
    return {"requestBody": {"description": about, "required": True, "content": content}}


def conditional_headers() -> Document:
    """Return the description of the headers for conditions and ranges (RFC 9110), for ``openapi_extra``."""
    about = {
        "Range": "bytes=a-b; one range",
        "If-None-Match": "an ETag that the client has",
        "If-Range": "an ETag that Range is for",
    }
    schema = {"type": "string"}
    headers = [{"name": it, "in": "header", "description": text, "schema": schema} for it, text in about.items()]
    return {"parameters": headers}


def describe_files(model: type[Any], *others: str) -> Document:
    """Return the answer with a generated file, or with the JSON of a model; ``others`` are further media types."""
    headers = header_docs(*(name for name in HEADERS if name.startswith("X-")))
    content = _FILES | dict.fromkeys(others, _FILE)
    return {"model": model, "description": "what was made", "headers": headers, "content": content}


def content_answers(*, has_body: bool) -> Responses:
    """Return the answers with a job's content; those to HEAD have no body."""
    whole = {"description": "the whole", "headers": header_docs("ETag")}
    known = {"description": "the client has it", "headers": header_docs("ETag")}
    if not has_body:
        return {200: whole, 304: known}
    content = {**_FILES, "audio/mp4": _FILE}
    part = {"description": "a part", "headers": header_docs("ETag", "Content-Range"), "content": content}
    return {200: {**whole, "content": content, "model": Actions}, 206: part, 304: known}


def make_document(app: FastAPI, service: Service, root_path: str = "") -> Document:
    """Return a service's document, below ``root_path``. The app caches it: it takes a good part of a second."""
    if app.state.document is None:
        made = app.openapi()
        components = made["components"]
        app.state.document = {
            **made,
            "security": [{_KEY: []}] if service.auth is not None else [],
            "components": {
                **components,
                "schemas": {**components["schemas"], **_body_schemas(service)},
                "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
            },
        }
    return {**app.state.document, "servers": [{"url": root_path or "/"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _body_schemas(service: Service) -> dict[str, Schema]:
    """Return name -> schema of every body."""
    schemas: dict[str, Schema] = {}
    models: tuple[type[Body], ...] = (*BODIES.values(), RemixBody)
    for model in models:
        name = model.__name__
        schemas |= {name: _body_schema(model, service), f"{name}Form": _body_schema(model, service, is_form=True)}
        if "extra_params" in model.model_fields:
            extra = _body_schema(model, service)
            del extra["properties"]["extra_params"]
            schemas[name]["properties"]["extra_params"]["anyOf"][0]["anyOf"][0] = _ref(f"{name}Extra")
            schemas[f"{name}Extra"] = extra
    return schemas


def _body_schema(model: type[Body], service: Service, *, is_form: bool = False) -> Schema:
    """Return the schema of a model, with other servers' names and the values that the service allows."""
    schema = model.model_json_schema(by_alias=False)
    properties: dict[str, Schema] = schema["properties"]
    rules = service.rules
    guardrails = [value for value, may in ((True, rules.has_guardrails), (False, rules.may_disable_guardrails)) if may]
    values = {"model": [*rules.model_names], "service_class": [*rules.classes], "guardrails": guardrails}
    for name, about in properties.items():
        del about["title"]
        if name in values:
            about["anyOf"][0] = {"type": about["anyOf"][0]["type"], "enum": values[name]}
        if is_form:
            about |= model.type_of(name).form_schema or about.pop("anyOf")[0]
    for alias, name in model.aliases().items():
        properties[alias] = {**properties[name], "description": f"the same as {name}"}
    unused: Schema = {"type": "string", "maxLength": LIMITS.max_prompt_chars} if is_form else {}
    refused: Schema = {"not": {}} if is_form else {"type": "null"}
    properties |= {name: {**unused, "description": f"without effect: {why}"} for name, why in model.no_effect.items()}
    properties |= {name: {**refused, "description": f"not offered: {why}"} for name, why in model.not_offered.items()}
    return {
        "type": "object",
        "required": schema.get("required", []),
        "patternProperties": {f"^{name_pattern(it)}$": properties.pop(it) for it in [*properties] if "*" in it},
        "properties": properties,
        "additionalProperties": False,
        "maxProperties": MAX_FIELDS,
    }
