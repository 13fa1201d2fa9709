"""The fields that each mode needs, and no other; tiny media for them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import PIL.Image

from cosmos3_core.media.writer import ClipFormat, open_writer


def moving_clip(num_frames: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Make a clip that is smooth and different everywhere: uint8 [F, Y, X, 3]."""
    frame, row, column = np.mgrid[:num_frames, :height, :width]
    waves = [np.sin((column + 3 * frame) / 9), np.cos((row - 2 * frame) / 7), np.sin((row + column) / 15 + frame / 3)]
    return (127.5 + 127.5 * np.stack(waves, axis=-1)).round().astype(np.uint8)


IMAGE = moving_clip(1, 32, 48)[0]
CLIP = moving_clip(9, 32, 48)
ACTIONS = [[0.1 * step, -0.2, 0.3, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0] for step in range(16)]
"""Of the embodiment "av"."""


def png(image: np.ndarray[Any, Any] = IMAGE) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def mp4(clip: np.ndarray[Any, Any] = CLIP) -> bytes:
    """Make a file of 24 frames per second."""
    stream = io.BytesIO()
    _, height, width, _ = clip.shape
    with open_writer(stream, ClipFormat("mp4", height=height, width=width, fps=24)) as writer:
        writer.write(clip)
        writer.close()
    return stream.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


RED_PNG = png(np.full((32, 32, 3), (200, 30, 30), np.uint8))
MINIMAL: dict[str, dict[str, Any]] = {
    "text_to_image": {"prompt": "a car", "mode": "text_to_image"},
    "text_to_video": {"prompt": "a car"},
    "image_to_video": {"prompt": "a car", "image": IMAGE},
    "video_to_video": {"prompt": "a car", "video": CLIP},
    "text_to_video_with_sound": {"prompt": "a car", "generate_sound": True},
    "image_to_video_with_sound": {"prompt": "a car", "image": IMAGE, "generate_sound": True},
    "video_to_video_with_sound": {"prompt": "a car", "video": CLIP, "generate_sound": True},
    "forward_dynamics": {"mode": "forward_dynamics", "image": IMAGE, "domain_name": "av", "actions": ACTIONS},
    "inverse_dynamics": {"mode": "inverse_dynamics", "video": CLIP, "domain_name": "av"},
    "policy": {"prompt": "go on", "mode": "policy", "image": IMAGE, "domain_name": "av"},
}
"""Mode -> fields of a :class:`cosmos3_core.GenerationRequest`."""
