"""Request bodies: fields as clients of vLLM-Omni's and OpenAI's APIs send them -> :class:`GenerationRequest`.

Only names, and what is special to HTTP, are decided here. Values are checked where the library checks them, in
:func:`cosmos3_core.resolve.resolve`, so that a wrong one says the same over HTTP as in Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_core import checks
from cosmos3_core.conditioning.modes import MODES, TEXT_TO_IMAGE, Actions
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.file_kinds import IMAGE_KINDS
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import FIELDS, GenerationRequest
from deployments.api.fields import (
    B64_JSON,
    FILE_ITSELF,
    MAX_IMAGES,
    PASSED_ON,
    SIZE_PATTERN,
    Endpoint,
)
from deployments.api.given_fields import Given, start_of
from deployments.api.given_media import given_media
from deployments.api.written import FieldOrigin, FieldOrigins, as_written
from deployments.config import DEFAULT_CLASS
from deployments.jobs.video import HIGH, LOSSLESS

_DEFAULT_FPS = 24.0
_MAX_SECONDS = 3600.0
# A request's field -> the one of a body that it is made of; and that is the same by another name.
_MADE_OF = {"num_frames": "seconds", "width": "size", "height": "size", "lossless": "quality"}
_SAME_AS = {"output": "output_format", "output_quality": "output_compression"}


@dataclass(frozen=True)
class BodyRules:
    """What bodies may say that depends on the service, or on whose they are.

    Attributes:
        model_name: of the served model.
        classes: that the caller may wait in.
        default_class: of bodies that name none.
        has_guardrails: whether anything is looked at.
        may_disable_guardrails: whether a caller may do without.
    """

    model_name: str
    classes: tuple[str, ...]
    default_class: str = DEFAULT_CLASS
    has_guardrails: bool = False
    may_disable_guardrails: bool = False


@dataclass(frozen=True)
class Wishes:
    """What a body says beside the request itself.

    Attributes:
        service_class: to wait in.
        previews: to record, at most.
        skip_guardrails: do without them.
        warnings: fields that were accepted without effect.
    """

    service_class: str = DEFAULT_CLASS
    previews: int = 0
    skip_guardrails: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoBody:
    """What ``POST /v1/videos`` and ``POST /v1/videos/sync`` ask for.

    Attributes:
        request: for the Director.
        wishes: beside it.
        is_live: whether the answer is to be the file while it grows.
        origins: of the request's fields.
    """

    request: GenerationRequest
    wishes: Wishes
    is_live: bool
    origins: FieldOrigins


@dataclass(frozen=True)
class ImageBody:
    """What ``POST /v1/images/generations`` asks for.

    Attributes:
        requests: one an image, in order; each has the next seed.
        wishes: beside them.
        response_format: ``b64_json`` or ``file``.
        origins: of the requests' fields.
    """

    requests: tuple[GenerationRequest, ...]
    wishes: Wishes
    response_format: str
    origins: FieldOrigins


def video_body(body: Given, rules: BodyRules) -> VideoBody:
    """A body of one of both endpoints for videos as what it asks for.

    Args:
        body: its fields.
        rules: for them.

    Raises:
        RequestError: another model's name, sizes that contradict each other, media that cannot be read ...
    """
    with as_written(body.origins):
        return _video_body(body, rules)


def _video_body(body: Given, rules: BodyRules) -> VideoBody:
    given = body.values
    wishes = _wishes(body, rules)
    width, height = _frame_size(given)
    passed = {name: given[name] for name in PASSED_ON if name in given}
    passed |= {"num_frames": _num_frames(given), "lossless": _lossless(given)}
    if isinstance(actions := given.get("actions"), dict) and "data" in actions:  # as an answer has them
        passed["actions"] = actions["data"]
    media = given_media(given)
    passed |= {kind: data for kind, (_, data) in media.items()}
    request = GenerationRequest(width=width, height=height, **passed)
    origins = {**_origins(body), **{kind: FieldOrigin(name) for kind, (name, _) in media.items() if kind != name}}
    return VideoBody(request, wishes, body.endpoint is Endpoint.SYNC and _is_live(given, request), origins)


def image_body(body: Given, rules: BodyRules) -> ImageBody:
    """A body of ``POST /v1/images/generations`` as what it asks for.

    Args:
        body, rules: as of :func:`video_body`.

    Raises:
        RequestError: as there, and what only images have is wrong.
    """
    with as_written(body.origins):
        return _image_body(body, rules)


def _image_body(body: Given, rules: BodyRules) -> ImageBody:
    given = dict(body.values)
    wishes = _wishes(body, rules)
    response_format = given.get("response_format", B64_JSON)
    if response_format == "url":
        hint = "Images are in the answer itself."
        raise RequestError("response_format", response_format, f"{B64_JSON} or {FILE_ITSELF}", hint)
    checks.choice("response_format", response_format, (B64_JSON, FILE_ITSELF))
    num_images = checks.integer("n", given.get("n", 1), 1, MAX_IMAGES)
    first_seed = given.get("seed", GenerationRequest.seed)
    checks.integer("seed", first_seed, 0, FIELDS["seed"].bounds[1] - num_images + 1)
    output = checks.choice("output_format", given.get("output_format", IMAGE_KINDS[0]), IMAGE_KINDS)
    if given.get("size") == "auto":
        del given["size"]
    width, height = _frame_size(given)
    passed = {name: given[name] for name in PASSED_ON if name in given} | {
        "mode": TEXT_TO_IMAGE,
        "width": width,
        "height": height,
        "output": output,
        "output_quality": _quality(given.get("output_compression"), output),
    }
    seeds = range(first_seed, first_seed + num_images)
    requests = tuple(GenerationRequest(**{**passed, "seed": seed}) for seed in seeds)
    return ImageBody(requests, wishes, response_format, _origins(body))


def _origins(body: Given) -> dict[str, FieldOrigin]:
    given = body.values
    made = {name: FieldOrigin(of, given[of]) for name, of in _MADE_OF.items() if of in given and name not in given}
    same = {name: FieldOrigin(of) for name, of in _SAME_AS.items() if of in given}
    return {**body.origins, **made, **same}


def _wishes(body: Given, rules: BodyRules) -> Wishes:
    given = body.values
    if given.get("model", rules.model_name) != rules.model_name:
        raise RequestError("model", start_of(given["model"]), f"{rules.model_name!r}, the one that is served")
    guardrails = checks.flag("guardrails", given.get("guardrails", True))
    if guardrails and not rules.has_guardrails and "guardrails" in given:
        hint = "Nothing is looked at here: the operator has not configured any."
        raise CapabilityError("guardrails", True, "false, or nothing", hint)
    if not guardrails and not rules.may_disable_guardrails:
        hint = "The operator of this service does not let clients turn them off."
        raise RequestError("guardrails", False, "true, or nothing", hint)
    return Wishes(
        service_class=checks.choice("service_class", given.get("service_class", rules.default_class), rules.classes),
        previews=checks.integer("previews", given.get("previews", 0), 0, MAX_PREVIEWS),
        skip_guardrails=not guardrails,
        warnings=body.warnings,
    )


def _is_live(given: Mapping[str, Any], request: GenerationRequest) -> bool:
    is_live = checks.flag("stream", given.get("stream", False))
    mode = MODES.get(request.mode) if isinstance(request.mode, str) else None
    is_clip = request.output in (None, "mp4") and request.num_frames != 1 and request.mode != TEXT_TO_IMAGE
    if is_live and (not is_clip or (mode is not None and mode.actions is Actions.GENERATED)):
        raise RequestError("stream", True, "only with an mp4 and without generated actions", "Nothing else grows.")
    return is_live


def _frame_size(given: Mapping[str, Any]) -> tuple[Any, Any]:
    width, height = given.get("width"), given.get("height")
    if "size" not in given:
        return width, height
    match = re.fullmatch(SIZE_PATTERN, given["size"], re.ASCII) if isinstance(given["size"], str) else None
    if match is None:
        raise RequestError("size", given["size"], "WIDTHxHEIGHT, such as 1280x720")
    columns, rows = map(int, given["size"].split("x"))
    if (width, height) not in ((None, None), (columns, rows)):
        raise RequestError("size", given["size"], f"the same as width={width} and height={height}, or one of both ways")
    return columns, rows


def _num_frames(given: Mapping[str, Any]) -> Any:
    if "seconds" not in given:
        return given.get("num_frames")
    seconds = checks.real("seconds", given["seconds"], 1 / _MAX_SECONDS, _MAX_SECONDS)
    if "num_frames" in given:
        return given["num_frames"]
    mode = MODES.get(given["mode"]) if isinstance(given.get("mode"), str) else None
    if mode is not None and mode.has_actions:
        raise RequestError("seconds", given["seconds"], f"nothing for {mode.name}; action_chunk_size decides")
    fps = FIELDS["fps"].check("fps", given.get("fps", _DEFAULT_FPS))
    return max(1, int(seconds * fps))


def _lossless(given: Mapping[str, Any]) -> Any:
    lossless = given.get("lossless", GenerationRequest.lossless)
    if "quality" not in given:
        return lossless
    is_lossless = checks.choice("quality", given["quality"], (HIGH, LOSSLESS)) == LOSSLESS
    if "lossless" in given and lossless != is_lossless:
        raise RequestError("quality", given["quality"], f"what agrees with lossless={lossless}", "Give one of both.")
    return is_lossless


def _quality(compression: Any, output: str) -> int | None:
    if compression is None:
        return None
    if output == "png":
        raise RequestError("output_compression", compression, "nothing for png; it is for jpeg and webp")
    return checks.integer("output_compression", compression, 0, 100)
