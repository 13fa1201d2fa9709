"""Defaults and limits: the one table, a row per (kind of checkpoint, mode).

A request leaves out what it likes; :func:`cosmos3_core.resolve.resolve` fills the gaps from here and nowhere else. A
mode that has no row is one that this kind of checkpoint was not trained for.
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
"""The noise schedules, which :mod:`cosmos3_core.sampler.schedule` makes."""


@dataclass(frozen=True)
class ActionPreset:
    """Defaults that only modes with actions have.

    Attributes:
        chunk_size: actions, one between two frames.
        resolution_tier: rows of the canvas that given pictures are fitted into, about: 256, 480, 704 or 720.
        domain_name: of the embodiment; None: a request has to say.
        raw_action_dim: numbers in an action; None: the embodiment's.
    """

    chunk_size: int
    resolution_tier: int
    domain_name: str | None = None
    raw_action_dim: int | None = None


@dataclass(frozen=True)
class Preset:
    """Defaults of one (kind of checkpoint, mode).

    Attributes:
        num_frames: pixel frames; with actions the chunk's actions and one.
        height, width: pixels; with actions the given picture and the tier decide.
        fps: frames per second.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 runs one branch.
        flow_shift: of the native and linear schedules.
        source: who says so.
        guidance_interval: lowest and highest timestep, of 1000, that guidance is for; None: all.
        action: of modes with actions.
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
# cosmos-framework's rows name no frame rate; diffusers' example does. It should be the data set's.
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
# Edge was trained neither with sound nor for clips that go on (vLLM-Omni 0.30).
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
    """Inclusive bounds that several fields of a request share, or that belong to its inputs as a whole.

    The bounds of a single field stand beside it, in :class:`cosmos3_core.request.GenerationRequest`.

    Attributes:
        max_side_pixels: what an H.264 encoder takes.
        max_prompt_chars: three times NVIDIA's structured negative prompt (14,850 characters).
        max_text_tokens: of one prompt after templates; keys and values of this many take 2.4 GB on Nano.
        max_actions: of a chunk, and of given ones; as many as the longest clip has steps between frames.
        max_action_value: of a given action's numbers, either way; the model's own are about 1.
        max_sound_s: seconds; the longest clip at 24 fps, and a waveform of 20 MB.
        max_media_bytes: of an image or clip that a user gives, as a file.
        max_image_pixels: of a given image, and of what it becomes when it is scaled to cover the size asked for; its
            decoded RGB takes 192 MiB. A phone's largest photographs have 50 Mpx.
        max_clip_frames: of a given clip, used or not; 200 s at 25 fps.
        max_clip_pixels: of one frame of a given clip; 4096 x 4096, more than 4K.
        max_clip_total_pixels: of all the frames that one request uses, as they are given and as they are encoded; 720p
            for 9 s at 24 fps. In memory together: 576 MiB of RGB, 2.3 GiB to be encoded.
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
