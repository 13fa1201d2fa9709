"""Defaults and limits of requests: one table, a row per (kind of checkpoint, mode).

:func:`cosmos3_core.resolve.resolve` fills the gaps of a request only from here. A row is missing where a kind of
checkpoint was not trained in the mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cosmos3_core.conditioning.modes import (
    FORWARD_DYNAMICS,
    IMAGE_TO_VIDEO,
    INVERSE_DYNAMICS,
    POLICY,
    TEXT_TO_IMAGE,
    TEXT_TO_VIDEO,
    VIDEO_TO_VIDEO,
    WITH_SOUND,
)

SCHEDULES = ("native", "linear", "karras")
"""The noise schedules of :mod:`cosmos3_core.sampler.schedule`."""


@dataclass(frozen=True)
class ActionPreset:
    """Further defaults of modes with actions.

    Attributes:
        chunk_size: number of actions, one between two frames.
        resolution_tier: tier of the canvas that given pictures are fitted into: 256, 480, 704 or 720.
        domain_name: name of the embodiment; None if a request must give it.
        raw_action_dim: numbers in an action; None takes the embodiment's.
    """

    chunk_size: int
    resolution_tier: int
    domain_name: str | None = None
    raw_action_dim: int | None = None


@dataclass(frozen=True)
class Preset:
    """Defaults of one (kind of checkpoint, mode).

    Attributes:
        num_frames: pixel frames; with actions one more than the chunk has actions.
        height, width: pixels; with actions the given picture and the tier decide them.
        fps: frames per second.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 runs one branch.
        flow_shift: shift of the native and linear schedules.
        source: source of the numbers.
        guidance_interval: lowest and highest timestep, of 1000, with guidance; None: all.
        action: further defaults of modes with actions.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    source: str
    guidance_interval: tuple[float, float] | None = None
    action: ActionPreset | None = None


_NVIDIA_VIDEO = Preset(189, 720, 1280, 24.0, 35, 6.0, 10.0, "NVIDIA cosmos-framework sample defaults, text2video")
_NVIDIA_IMAGE = Preset(
    1, 960, 960, 24.0, 50, 4.0, 3.0, "NVIDIA cosmos-framework sample defaults, text2image, 1:1 at 720p"
)
# cosmos-framework's rows have no frame rate: this is that of diffusers' example; the data set's own is better.
_NVIDIA_ACTION = Preset(
    17,
    256,
    256,
    5.0,
    30,
    1.0,
    10.0,
    "NVIDIA cosmos-framework sample defaults, forward and inverse dynamics and policy; frame rate: diffusers' example",
    action=ActionPreset(16, 256),
)
_POLICY_DROID = Preset(
    33,
    540,
    640,
    15.0,
    4,
    3.0,
    5.0,
    "vLLM-Omni 0.30's policy server for Cosmos3-Nano-Policy-DROID: joint positions",
    action=ActionPreset(32, 480, "droid_lerobot", 8),
)
_EDGE_VIDEO = Preset(189, 480, 832, 24.0, 35, 5.0, 3.0, "SGLang 0.5.23 and vLLM-Omni 0.30 for Edge, video")
_EDGE_IMAGE = Preset(1, 640, 640, 24.0, 35, 7.0, 3.0, "SGLang 0.5.23 and vLLM-Omni 0.30 for Edge, image")
_EDGE_ACTION = replace(
    _NVIDIA_ACTION, source=f"{_NVIDIA_ACTION.source}; SGLang 0.5.23 and vLLM-Omni 0.30 take the same shift for Edge"
)

_VIDEO_MODES = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO, VIDEO_TO_VIDEO)
_NVIDIA_ROWS = {
    TEXT_TO_IMAGE: _NVIDIA_IMAGE,
    **dict.fromkeys(_VIDEO_MODES, _NVIDIA_VIDEO),
    **dict.fromkeys((mode + WITH_SOUND for mode in _VIDEO_MODES), _NVIDIA_VIDEO),
    **dict.fromkeys((FORWARD_DYNAMICS, INVERSE_DYNAMICS, POLICY), _NVIDIA_ACTION),
}
# Edge was trained neither with sound nor on continuing clips (vLLM-Omni 0.30).
_EDGE_ROWS = {
    TEXT_TO_IMAGE: _EDGE_IMAGE,
    **dict.fromkeys((TEXT_TO_VIDEO, IMAGE_TO_VIDEO), _EDGE_VIDEO),
    **dict.fromkeys((FORWARD_DYNAMICS, INVERSE_DYNAMICS, POLICY), _EDGE_ACTION),
}
_ROWS = {
    "nano": _NVIDIA_ROWS,
    "super": _NVIDIA_ROWS,
    "edge": _EDGE_ROWS,
    "nano-policy-droid": {**_NVIDIA_ROWS, POLICY: _POLICY_DROID},
}

PRESETS: dict[tuple[str, str], Preset] = {
    (kind, mode): preset for kind, rows in _ROWS.items() for mode, preset in rows.items()
}


@dataclass(frozen=True)
class Limits:
    """Inclusive bounds that several fields of a request share, or that hold for its inputs as a whole.

    The bounds of a single field are beside it, in :class:`cosmos3_core.request.GenerationRequest`.

    Attributes:
        max_side_pixels: longest side of a picture; the limit of an H.264 encoder.
        max_prompt_chars: longest prompt; three times NVIDIA's structured negative prompt (14,850 characters).
        max_text_tokens: tokens of one prompt after templates; their keys and values take 2.4 GB on Nano.
        max_actions: actions of a chunk or a request; as many as the longest clip has steps between frames.
        max_action_value: absolute value of a number in a given action; the model's own are about 1.
        max_sound_s: seconds of sound; the longest clip at 24 fps, and a waveform of 20 MB.
        max_media_bytes: bytes of a given image or clip, as a file.
        max_image_pixels: pixels of a given image, also when it is scaled to cover the requested size; its decoded RGB
            takes 192 MiB. A phone's largest photographs have 50 Mpx.
        max_clip_frames: frames of a given clip, used or not; 200 s at 25 fps.
        max_clip_pixels: pixels of one frame of a given clip; 4096 x 4096, more than 4K.
        max_clip_total_pixels: pixels of all frames that one request uses, both as given and as encoded; 720p for 9 s at
            24 fps. Together they take 576 MiB as RGB and 2.3 GiB for the encoder.
    """

    max_side_pixels: int = 16_384
    max_prompt_chars: int = 50_000
    max_text_tokens: int = 16_384
    max_actions: int = 1200
    max_action_value: float = 1e6
    max_sound_s: float = 60.0
    max_media_bytes: int = 64 * 2**20
    max_image_pixels: int = 64 * 2**20
    max_clip_frames: int = 5000
    max_clip_pixels: int = 16 * 2**20
    max_clip_total_pixels: int = 192 * 2**20


LIMITS = Limits()
