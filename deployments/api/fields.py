"""Bodies of requests as pydantic models: a field is effective, without effect, or not offered yet.

Clients of vLLM-Omni's and OpenAI's APIs send all three: fields without effect are accepted with a warning, those not
offered are refused. FIELDS.md is made from these models.
"""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, ClassVar, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from cosmos3_core import checks
from cosmos3_core.conditioning.modes import MODES, TEXT_TO_IMAGE, ActionRole
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import IMAGE_KINDS
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import FIELDS, GenerationRequest
from deployments.api.field_types import (
    FieldType,
    file_type,
    flag_type,
    integer_type,
    object_type,
    prompt_type,
    seconds_type,
    size_type,
    text_type,
    type_of_spec,
)
from deployments.jobs.video import HIGH, LOSSLESS

B64_JSON, FILE_ITSELF = "b64_json", "file"
"""Ways in which an answer has its images."""

_MAX_IMAGES = 10
_DEFAULT_FPS = 24.0
_SHARED = {it.name for it in dataclasses.fields(GenerationRequest)} - {"image", "video", "width", "height"}


class Endpoint(StrEnum):
    """Paths that take requests for generations."""

    VIDEOS = "/v1/videos"
    SYNC = "/v1/videos/sync"
    IMAGES = "/v1/images/generations"


def request_field(name: str) -> FieldType:
    """Return the type of a field of :class:`GenerationRequest`, with its bounds and description."""
    return type_of_spec(FIELDS[name])


def also(*aliases: str) -> Any:
    """Declare other servers' names for a field."""
    return Field(None, validation_alias=AliasChoices(*aliases))


def _invert(reasons: Mapping[str, str]) -> dict[str, str]:
    """Invert reason -> names to name -> reason."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


_NO_EFFECT = _invert(
    {
        "the caller's own note": "user",
        "prompts are not cut off; one that is too long is refused": "max_sequence_length",
        "answers always have them": "return_stage_metrics",
        "noise is always drawn on the CPU": "generator_device",
        "the operator decides": "vae_use_slicing vae_use_tiling",
        "prompts say length and frame rate as the model was trained": "use_duration_template",
        "prompts say the size as the model was trained": "use_resolution_template",
        "one request makes one clip": "num_outputs_per_prompt",
        "the other fields decide": "modalities",
        "a field of other models": "true_cfg_scale guidance_scale_2 boundary_ratio",
    }
)
_NO_EFFECT_ON_CLIPS = _invert(
    {
        "give size": "aspect_ratio short_edge",
        "sound is as long as the pictures": "sound_duration audio_duration",
        "a field of other models": "enable_frame_interpolation frame_interpolation_*",
        "give crf, or lossless": "video_codec_options",
    }
)
_NO_EFFECT_ON_IMAGES = _invert({"a field of other models": "layers bot_task system_prompt"})
_NOT_OFFERED = _invert({"low-rank adapters": "lora"})
_NOT_OFFERED_FOR_CLIPS = _invert(
    {
        "transfer from edges, depth and other controls": """
            control_reference control_type edge blur depth seg wsm control control_path control_weight
            preset_edge_threshold preset_blur_strength control_guidance control_guidance_interval
            num_video_frames_per_chunk num_conditional_frames num_first_chunk_conditional_frames max_frames
            share_vision_temporal_positions emphasize_control_in_prompt show_control_condition show_input
        """,
        "OpenPI's policy server": "robot_obs observation",
        "sound that follows given sound": "audio_reference",
        "editing of given clips": "source_video source_audio *_noise_mask",
        "files on the server; send the rows as actions": "action_path",
    }
)


class Body(BaseModel):
    """A body of named fields.

    Attributes:
        no_effect: name -> reason, of fields that are accepted without effect; ``*`` stands for part of a name.
        not_offered: the same of fields that ask for what the service does not do yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=False)
    no_effect: ClassVar[Mapping[str, str]] = {}
    not_offered: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @cache
    def aliases(cls) -> dict[str, str]:
        """Return other servers' name -> own name."""
        choices = {name: info.validation_alias for name, info in cls.model_fields.items()}
        pairs = ((name, it.choices) for name, it in choices.items() if isinstance(it, AliasChoices))
        return {str(alias): name for name, aliases in pairs for alias in aliases}

    @classmethod
    @cache
    def lists(cls) -> frozenset[str]:
        """Return the fields that a form may have several times."""
        return frozenset(name for name in cls.model_fields if cls.type_of(name).takes_several)

    @classmethod
    def type_of(cls, name: str) -> FieldType:
        """Return the type of a field."""
        (found,) = cls.model_fields[name].metadata
        return cast(FieldType, found)

    @property
    def given_fields(self) -> dict[str, Any]:
        """Return the fields that the body gives, by their own names."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class RemixBody(Body):
    """Body of ``POST /v1/videos/{video_id}/remix``; everything else is the earlier request's."""

    prompt: Annotated[str, prompt_type("the new prompt")]


class RequestBody(Body):
    """Fields that every endpoint for generations takes."""

    no_effect = _NO_EFFECT
    not_offered = _NOT_OFFERED

    prompt: Annotated[str | None, request_field("prompt")] = None
    negative_prompt: Annotated[str | None, request_field("negative_prompt")] = None
    num_inference_steps: Annotated[int | None, request_field("num_inference_steps")] = None
    guidance_scale: Annotated[float | None, request_field("guidance_scale")] = None
    guidance_interval: Annotated[list[float] | None, request_field("guidance_interval")] = None
    flow_shift: Annotated[float | None, request_field("flow_shift")] = None
    schedule: Annotated[str | None, request_field("schedule")] = None
    seed: Annotated[int | None, request_field("seed")] = None
    use_system_prompt: Annotated[bool | None, request_field("use_system_prompt")] = None
    negative_metadata: Annotated[str | None, request_field("negative_metadata")] = also("negative_metadata_mode")
    compat: Annotated[str | None, request_field("compat")] = None
    model: Annotated[str | None, text_type("the served model's name, if given")] = None
    service_class: Annotated[str | None, text_type("class of the queue that the request waits in")] = also("priority")
    guardrails: Annotated[bool | None, flag_type("false: without them, where the operator allows it")] = None
    extra_params: Annotated[
        dict[str, Any] | None, object_type("an object whose keys count as if they stood beside it")
    ] = None

    @abstractmethod
    def requests(self, media: dict[str, bytes]) -> tuple[GenerationRequest, ...]:
        """Return what the body asks for, in order, with its files; raise RequestError for fields that conflict."""

    def _select_shared(self) -> dict[str, Any]:
        """Return the fields that a request has under the same name."""
        return {name: value for name, value in self.given_fields.items() if name in _SHARED}


class _ClipBody(RequestBody):
    """Fields of both endpoints for videos."""

    no_effect = {**_NO_EFFECT, **_NO_EFFECT_ON_CLIPS}
    not_offered = {**_NOT_OFFERED, **_NOT_OFFERED_FOR_CLIPS}

    image: Annotated[bytes | None, file_type("an image to begin with")] = None
    video: Annotated[bytes | None, file_type("a clip to continue, or to find the actions of")] = None
    input_reference: Annotated[
        bytes | None, file_type("an image or a clip, whichever its content is; of an animated image the first frame")
    ] = None
    input_references: Annotated[
        bytes | None, file_type("a list of one, as input_reference; more are not offered", takes_several=True)
    ] = None
    image_reference: Annotated[bytes | None, file_type('{"image_url": "data:..."}')] = None
    video_reference: Annotated[bytes | None, file_type('{"video_url": "data:..."}')] = None
    mode: Annotated[str | None, request_field("mode")] = also("action_mode")
    generate_sound: Annotated[bool | None, request_field("generate_sound")] = also("sound_gen")
    size: Annotated[str | None, size_type("WIDTHxHEIGHT in pixels, multiples of 16")] = None
    height: Annotated[int | None, request_field("height")] = None
    width: Annotated[int | None, request_field("width")] = None
    seconds: Annotated[float | None, seconds_type("length; num_frames wins over it")] = None
    num_frames: Annotated[int | None, request_field("num_frames")] = None
    fps: Annotated[float | None, request_field("fps")] = also("action_fps")
    condition_frame_indexes_vision: Annotated[
        list[int] | int | None, request_field("condition_frame_indexes_vision")
    ] = None
    condition_video_keep: Annotated[str | None, request_field("condition_video_keep")] = None
    actions: Annotated[Any, request_field("actions")] = also("action")
    action_chunk_size: Annotated[int | None, request_field("action_chunk_size")] = None
    domain_name: Annotated[str | None, request_field("domain_name")] = None
    domain_id: Annotated[int | None, request_field("domain_id")] = None
    raw_action_dim: Annotated[int | None, request_field("raw_action_dim")] = None
    resolution_tier: Annotated[int | None, request_field("resolution_tier")] = also("resolution", "image_size")
    view_point: Annotated[str | None, request_field("view_point")] = None
    output: Annotated[str | None, request_field("output")] = None
    output_quality: Annotated[int | None, request_field("output_quality")] = None
    crf: Annotated[float | None, request_field("crf")] = None
    lossless: Annotated[bool | None, request_field("lossless")] = None
    quality: Annotated[str | None, text_type("lossless: as lossless=true; high: the default", HIGH, LOSSLESS)] = None

    def requests(self, media: dict[str, bytes]) -> tuple[GenerationRequest, ...]:
        """Return the one request of the body."""
        width, height = parse_size(self.size) or (self.width, self.height)
        if self.size is not None and (self.width, self.height) not in ((None, None), (width, height)):
            allowed = f"the same as width={self.width} and height={self.height}, or left out"
            raise RequestError("size", self.size, allowed)
        computed = {"width": width, "height": height, "num_frames": self._num_frames(), "lossless": self._is_lossless()}
        return (GenerationRequest(**self._select_shared() | computed | media),)

    def _num_frames(self) -> int | None:
        if self.num_frames is not None or self.seconds is None:
            return self.num_frames
        if self.mode is not None and MODES[self.mode].has_actions:
            raise RequestError("seconds", self.seconds, f"left out for {self.mode}; action_chunk_size decides")
        return max(1, int(self.seconds * (_DEFAULT_FPS if self.fps is None else self.fps)))

    def _is_lossless(self) -> bool:
        if self.quality is None:
            return bool(self.lossless)
        if self.lossless not in (None, self.quality == LOSSLESS):
            raise RequestError(
                "quality", self.quality, f"what agrees with lossless={self.lossless}", "Give one of both."
            )
        return self.quality == LOSSLESS


class VideoBody(_ClipBody):
    """Body of ``POST /v1/videos``."""

    no_effect = {**_ClipBody.no_effect, "stream": f"only {Endpoint.SYNC} sends the mp4 while it is made"}

    previews: Annotated[
        int, integer_type("number of small pictures of what is being made, sent as events", 0, MAX_PREVIEWS)
    ] = 0


class SyncBody(_ClipBody):
    """Body of ``POST /v1/videos/sync``."""

    no_effect = {**_ClipBody.no_effect, "previews": f"only {Endpoint.VIDEOS} has events with previews"}

    stream: Annotated[
        bool, flag_type("send the mp4 while it is made: fragmented, without the headers that say what it became")
    ] = False

    def requests(self, media: dict[str, bytes]) -> tuple[GenerationRequest, ...]:
        """Return the one request of the body; with ``stream``, it must make an mp4."""
        (request,) = super().requests(media)
        if self.stream:
            is_clip = request.output in (None, "mp4") and request.num_frames != 1 and request.mode != TEXT_TO_IMAGE
            if not is_clip or (request.mode is not None and MODES[request.mode].actions is ActionRole.GENERATED):
                allowed = "false but for an mp4 without generated actions"
                raise RequestError("stream", True, allowed, "Nothing else grows.")
        return (request,)


def _check_response_format(name: str, value: Any) -> str:
    if value == "url":
        raise RequestError(name, value, f"{B64_JSON} or {FILE_ITSELF}", "Images are in the answer itself.")
    return checks.choice(name, value, (B64_JSON, FILE_ITSELF))


_RESPONSE_FORMAT = replace(
    text_type("file: the image itself, or a zip of several", B64_JSON, FILE_ITSELF), check=_check_response_format
)


class ImageBody(RequestBody):
    """Body of ``POST /v1/images/generations``."""

    no_effect = {**_NO_EFFECT, **_NO_EFFECT_ON_IMAGES}

    n: Annotated[int, integer_type("images; image i of them has seed + i", 1, _MAX_IMAGES)] = 1
    size: Annotated[str | None, size_type("WIDTHxHEIGHT in pixels, multiples of 16, or auto", is_auto_allowed=True)] = (
        None
    )
    response_format: Annotated[str, _RESPONSE_FORMAT] = B64_JSON
    output_format: Annotated[str, text_type("kind of the images' files", *IMAGE_KINDS)] = IMAGE_KINDS[0]
    output_compression: Annotated[int | None, request_field("output_quality")] = None

    def requests(self, media: dict[str, bytes]) -> tuple[GenerationRequest, ...]:
        """Return one request per image, with consecutive seeds."""
        first_seed = GenerationRequest.seed if self.seed is None else self.seed
        checks.integer("seed", first_seed, 0, FIELDS["seed"].bounds[1] - self.n + 1)
        if self.output_compression is not None and self.output_format == "png":
            raise RequestError(
                "output_compression", self.output_compression, "left out for png; it is for jpeg and webp"
            )
        width, height = parse_size(self.size) or (None, None)
        request = GenerationRequest(
            **self._select_shared(),
            mode=TEXT_TO_IMAGE,
            width=width,
            height=height,
            output=self.output_format,
            output_quality=self.output_compression,
        )
        return tuple(replace(request, seed=first_seed + index) for index in range(self.n))


BODIES: Mapping[Endpoint, type[RequestBody]] = {
    Endpoint.VIDEOS: VideoBody,
    Endpoint.SYNC: SyncBody,
    Endpoint.IMAGES: ImageBody,
}
"""Endpoint -> model of its bodies."""


def parse_size(size: str | None) -> tuple[int, int] | None:
    """Return width and height of a checked size; None if it leaves them open."""
    if size in (None, "auto"):
        return None
    width, height = map(int, str(size).split("x"))
    return width, height


def find_reason(reasons: Mapping[str, str], name: str) -> str | None:
    """Return the reason for a name in a table of reasons; None if it has none."""
    return next((why for written, why in reasons.items() if re.fullmatch(name_pattern(written), name)), None)


def name_pattern(name: str) -> str:
    """Return the regular expression for a name in which ``*`` stands for any part."""
    return "[a-z0-9_]{1,64}".join(re.escape(part) for part in name.split("*"))
