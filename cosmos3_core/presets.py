"""Defaults and limits: the one table, a row per (checkpoint family, mode).

A request leaves out what it likes; :func:`cosmos3_core.request.resolve` fills the gaps from here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_TO_VIDEO = "text_to_video"
TEXT_TO_IMAGE = "text_to_image"


@dataclass(frozen=True)
class Preset:
    """Defaults of one (family, mode).

    Attributes:
        num_frames: pixel frames.
        height, width: pixels.
        fps: frames per second.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 runs one branch.
        flow_shift: of the native and linear schedules.
        source: who says so.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    source: str


_NVIDIA_VIDEO = Preset(189, 720, 1280, 24.0, 35, 6.0, 10.0, "NVIDIA cosmos-framework sample defaults, text2video")
_NVIDIA_IMAGE = Preset(
    1, 960, 960, 24.0, 50, 4.0, 3.0, "NVIDIA cosmos-framework sample defaults, text2image, 1:1 at 720p"
)
_EDGE_VIDEO = Preset(189, 480, 832, 24.0, 35, 5.0, 3.0, "SGLang 0.5.23 and vLLM-Omni 0.30 for Edge, video")
_EDGE_IMAGE = Preset(1, 640, 640, 24.0, 35, 7.0, 3.0, "SGLang 0.5.23 and vLLM-Omni 0.30 for Edge, image")

PRESETS: dict[tuple[str, str], Preset] = {
    ("nano", TEXT_TO_VIDEO): _NVIDIA_VIDEO,
    ("nano", TEXT_TO_IMAGE): _NVIDIA_IMAGE,
    ("super", TEXT_TO_VIDEO): _NVIDIA_VIDEO,
    ("super", TEXT_TO_IMAGE): _NVIDIA_IMAGE,
    ("edge", TEXT_TO_VIDEO): _EDGE_VIDEO,
    ("edge", TEXT_TO_IMAGE): _EDGE_IMAGE,
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, whatever the checkpoint. Inclusive.

    Attributes:
        max_num_frames: 50 s at 24 fps, four times the longest clip NVIDIA documents (300 frames).
        max_side_pixels: what an H.264 encoder takes.
        max_num_inference_steps: one per training timestep.
        max_guidance_scale: as in vLLM-Omni's API.
        max_prompt_chars: three times NVIDIA's structured negative prompt (14,850 characters).
        max_text_tokens: of one prompt after templates; keys and values of this many take 2.4 GB on Nano.
        max_media_bytes: of an image or clip that a user gives, as a file.
        max_image_pixels: of a given image; its decoded RGB takes 192 MiB. A phone's largest photographs have 50 Mpx.
        max_clip_frames: of a given clip, used or not; 200 s at 25 fps.
        max_clip_pixels: of one frame of a given clip; 4096 x 4096, more than 4K.
        max_clip_total_pixels: of all the frames that one request uses, which are in memory together: 3.4 GiB of RGB.
    """

    max_num_frames: int = 1201
    max_side_pixels: int = 16_384
    max_num_inference_steps: int = 1000
    max_guidance_scale: float = 20.0
    min_flow_shift: float = 0.001
    max_flow_shift: float = 100.0
    min_fps: float = 1.0
    max_fps: float = 120.0
    max_seed: int = 2**63 - 1
    max_prompt_chars: int = 50_000
    max_text_tokens: int = 16_384
    max_media_bytes: int = 64 * 2**20
    max_image_pixels: int = 64 * 2**20
    max_clip_frames: int = 5000
    max_clip_pixels: int = 16 * 2**20
    max_clip_total_pixels: int = 1_201 * 1280 * 800


LIMITS = Limits()
