"""What the API takes and answers, as JSON schemas: the components of the OpenAPI document."""

from __future__ import annotations

import re
from typing import Any

from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.presets import LIMITS
from deployments.api.body_limit import MAX_FIELDS
from deployments.api.field_kinds import FILE, OBJECT, ROWS, Schema
from deployments.api.fields import ALIASES, FIELDS, Endpoint, Field, Use, name_pattern
from deployments.api.service import Service
from deployments.jobs.job import JOB_ID
from deployments.jobs.video import HIGH, LOSSLESS

JOB_ID_PATTERN = f"^{JOB_ID.pattern}$"

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_DURATIONS: Schema = {"type": "object", "additionalProperties": _SECONDS}
_BASE64: Schema = {"type": "string", "contentEncoding": "base64"}
_BINARY: Schema = {"type": "string", "format": "binary"}
_MODE: Schema = {"type": "string", "enum": list(MODES)}
_JOB_ID: Schema = {"type": "string", "pattern": JOB_ID_PATTERN}


def ref(name: str) -> Schema:
    """A reference to a component's schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def answers() -> dict[str, Schema]:
    """Name -> schema of everything that is answered as JSON."""
    return {
        "Error": _error(),
        "Video": _video(),
        "VideoList": _object(
            object={"const": "list"},
            data={"type": "array", "items": ref("Video"), "maxItems": 100},
            first_id=_or_null(_JOB_ID),
            last_id=_or_null(_JOB_ID),
            has_more=_FLAG,
        ),
        "VideoDeleted": _object(id=_JOB_ID, object={"const": "video.deleted"}, deleted={"const": True}),
        "Actions": _actions(),
        "GeneratedActions": _object(
            id=_JOB_ID,
            mode=_MODE,
            actions=ref("Actions"),
            video=_or_null(_object(media_type=_TEXT, b64_json=_BASE64)),
            seed=_COUNT,
            fps=_SECONDS,
            num_frames=_COUNT,
            height=_COUNT,
            width=_COUNT,
            frames_sha256=_TEXT,
            negative_prompt_origin=_TEXT,
            notes=_TEXTS,
            stage_durations=_DURATIONS,
        ),
        "Images": _object(
            created=_COUNT,
            data={
                "type": "array",
                "items": _object(
                    id=_JOB_ID,
                    b64_json=_BASE64,
                    url={"type": "null"},
                    revised_prompt={"type": "null"},
                    seed=_COUNT,
                    frames_sha256=_TEXT,
                ),
            },
            output_format=_TEXT,
            size={"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
            metrics=_object(stage_durations=_DURATIONS),
        ),
        "Models": _object(
            object={"const": "list"},
            data={
                "type": "array",
                "items": _object(
                    id=_TEXT,
                    object={"const": "model"},
                    created=_COUNT,
                    owned_by=_TEXT,
                    family=_TEXT,
                    modes={"type": "array", "items": _MODE},
                ),
            },
        ),
        "Health": _object(status={"const": "ok"}),
        "Ready": _object(status={"const": "ready"}),
        "NotReady": {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"enum": ["not ready", "shutting down"]}, "waiting_for": _TEXTS},
            "additionalProperties": False,
        },
    }


def bodies(service: Service) -> dict[str, Schema]:
    """Name -> schema of everything that is sent, see :func:`body_name`."""
    schemas: dict[str, Schema] = {}
    for endpoint in Endpoint:
        extra = _fields(endpoint, service)
        del extra["properties"]["extra_params"]
        schemas[_extra_name(endpoint)] = extra
        for is_form in (False, True):
            schemas[body_name(endpoint, is_form=is_form)] = _fields(endpoint, service, is_form=is_form)
    prompt: Schema = {"type": "string", "pattern": r"\S", "maxLength": LIMITS.max_prompt_chars}
    schemas["Remix"] = _object(prompt=prompt)
    return schemas


def body_name(endpoint: Endpoint, *, is_form: bool) -> str:
    """Of the component that is an endpoint's body."""
    words = re.findall("[a-z]+", endpoint.removeprefix("/v1/"))
    return "".join(word.capitalize() for word in (*words, "form" if is_form else "body"))


def _extra_name(endpoint: Endpoint) -> str:
    return body_name(endpoint, is_form=False).removesuffix("Body") + "Extra"


def _fields(endpoint: Endpoint, service: Service, *, is_form: bool = False) -> Schema:
    properties: dict[str, Schema] = {}
    patterns: dict[str, Schema] = {}
    for name, field in FIELDS[endpoint].items():
        schema = _field(name, field, endpoint, service, is_form=is_form)
        if "*" in name:
            patterns[f"^{name_pattern(name)}$"] = schema
        else:
            properties[name] = schema
    for alias, name in ALIASES.items():
        if name in properties:
            properties[alias] = {**properties[name], "description": f"the same as {name}"}
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": patterns,
        "additionalProperties": False,
        "maxProperties": MAX_FIELDS,
    }


def _field(name: str, field: Field, endpoint: Endpoint, service: Service, *, is_form: bool) -> Schema:
    use = field.uses[endpoint]
    if use is Use.NOT_OFFERED:
        return {**({"not": {}} if is_form else {"type": "null"}), "description": f"not offered: {field.about}"}
    if use is Use.IGNORED:
        anything: Schema = {"type": "string", "maxLength": LIMITS.max_prompt_chars} if is_form else {}
        return {**anything, "description": f"without effect: {field.about}"}
    schema = field.kind.schema
    if name == "model":
        schema = {"type": "string", "enum": [service.model.id]}
    elif name == "service_class":
        schema = {"type": "string", "enum": list(service.classes)}
    elif name == "guardrails":
        allowed = [*([True] if service.has_guardrails else []), *([False] if service.may_disable_guardrails else [])]
        schema = {"type": "boolean", "enum": allowed}
    elif name == "extra_params":
        _, text = schema["anyOf"]
        schema = {"anyOf": [ref(_extra_name(endpoint)), text]}
    if field.kind in (OBJECT, ROWS) and is_form:
        schema = schema["anyOf"][-1]  # the text
    if field.kind is FILE and is_form:
        schema = _BINARY
    return {**(schema if is_form else _or_null(schema)), "description": field.about}


def _error() -> Schema:
    told = _object(
        message=_TEXT,
        type={"enum": ["invalid_request_error", "server_error"]},
        code={"type": "string", "description": "short name of the fault"},
        param={**_or_null(_TEXT), "description": "the field at fault"},
    )
    told["properties"] |= {
        "given": {"type": "string", "description": "what it held, shortened"},
        "allowed": {"type": "string", "description": "what would have been accepted"},
        "hint": {"type": "string", "description": "what to do"},
    }
    return _object(error=told)


def _video() -> Schema:
    return _object(
        id=_JOB_ID,
        object={"const": "video"},
        status={"enum": ["queued", "in_progress", "completed", "failed"]},
        progress={"type": "integer", "minimum": 0, "maximum": 100},
        model=_TEXT,
        prompt=_TEXT,
        size={"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
        seconds={"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
        quality={"enum": [HIGH, LOSSLESS]},
        created_at=_COUNT,
        completed_at=_or_null(_COUNT),
        expires_at={**_or_null(_COUNT), "description": "until when its file is kept"},
        error=_or_null(_object(code={"type": "string", "description": "cancelled, or why it failed"}, message=_TEXT)),
        media_type=_or_null(_TEXT),
        file_name=_or_null(_TEXT),
        inference_time_s=_or_null(_SECONDS),
        fps=_SECONDS,
        num_frames=_COUNT,
        duration_s=_SECONDS,
        metrics={
            "type": "object",
            "properties": {
                "queue_s": {**_SECONDS, "description": "until its run began; with runs before it that did not end"},
                "run_s": _SECONDS,
            },
        },
        stage_durations=_DURATIONS,
        peak_memory_mb={"type": "null"},
        action=_or_null(ref("Actions")),
        remixed_from_video_id=_or_null(_JOB_ID),
        mode=_MODE,
        seed=_COUNT,
        service_class=_TEXT,
        stage={"type": "string", "description": "what it is in"},
        step={**_COUNT, "description": "denoising steps that are done"},
        num_steps=_COUNT,
        sigma={**_or_null({"type": "number"}), "description": "noise level that the last step left"},
        eta_s={**_or_null(_SECONDS), "description": "until its last step, about"},
        queue_position={**_or_null(_COUNT), "description": "jobs before it, those that run included"},
        attempts={**_COUNT, "description": "how often it was begun"},
        notes={**_TEXTS, "description": "what was changed on the way"},
        warnings={**_TEXTS, "description": "fields that were accepted without effect"},
        frames_sha256=_or_null(_SHA256),
    )


def _actions() -> Schema:
    actions = _object(
        data={"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        shape={"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2},
        dtype={"const": "float32"},
        raw_action_dim=_COUNT,
        domain_id=_COUNT,
        domain_name=_TEXT,
        is_normalised=_FLAG,
    )
    actions["properties"]["action_mode"] = _MODE
    return actions


def _object(**properties: Any) -> Schema:
    """An object that has all of these and nothing else."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
