"""Given pixels -> pixels of the size that the model takes: one policy each for an image, a clip and an action's clip.

Source: diffusers 0.42.1, ``_preprocess_conditioning_image``, ``VideoProcessor.preprocess_video`` and
``_prepare_action_video_conditioning``: the same operations in the same order, so that the pixels are the same.

Shape letters: C channels, F/Y/X pixel frames, rows, columns. All results are fp32 on the CPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosmos3_core.conditioning.canvas import Canvas, action_canvas, content_size, floored
from cosmos3_core.media.pixels import Frames


def crop_to_fill(image_YX3: Frames, height: int, width: int) -> Tensor:
    """An image, scaled until it covers the target and cut in the middle; image to video.

    Args:
        image_YX3: uint8 RGB.
        height, width: pixels of the result.

    Returns:
        [3, Y, X] in [-1, 1]: one of 256 values each, rounded after scaling.
    """
    # A copy, because the array may be read-only, which PyTorch does not know.
    image_1CYX = torch.from_numpy(image_YX3.copy()).permute(2, 0, 1).unsqueeze(0).to(torch.float32)
    rows, columns = image_YX3.shape[:2]
    scale = max(width / columns, height / rows)
    scaled_rows, scaled_columns = math.ceil(scale * rows), math.ceil(scale * columns)
    image_1CYX = F.interpolate(
        image_1CYX, (scaled_rows, scaled_columns), mode="bilinear", align_corners=False, antialias=True
    )
    top, left = round((scaled_rows - height) / 2), round((scaled_columns - width) / 2)
    image_CYX = image_1CYX[0, :, top : top + height, left : left + width]
    return image_CYX.round().clamp(0, 255) / 127.5 - 1.0


def stretch(frames_FYX3: Frames, height: int, width: int) -> Tensor:
    """A clip's frames, each brought to the target whatever its proportions; video to video.

    Args:
        frames_FYX3: uint8 RGB.
        height, width: pixels of the result.

    Returns:
        [3, F, Y, X] in [-1, 1].
    """
    pixels_CFYX = torch.empty((3, len(frames_FYX3), height, width), dtype=torch.float32)
    for index, frame in enumerate(frames_FYX3):
        scaled = Image.fromarray(frame).resize((width, height), resample=Image.Resampling.BILINEAR)
        unit = np.asarray(scaled).astype(np.float32) / 255.0
        pixels_CFYX[:, index] = torch.from_numpy(2.0 * unit - 1.0).permute(2, 0, 1)
    return pixels_CFYX


def fit_and_pad(frames_FYX3: Frames, tier: int, num_frames: int) -> tuple[Tensor, Canvas]:
    """A clip's frames, shrunk to fit the canvas of their tier and mirrored beyond their edges; action.

    Args:
        frames_FYX3: uint8 RGB, at least 16 x 16. The last is repeated where there are fewer than ``num_frames``.
        tier: one of :data:`cosmos3_core.conditioning.canvas.ACTION_TIERS`.
        num_frames: of the result.

    Returns:
        [3, F, Y, X] on the canvas, and the rows and columns of it that the clip fills. In [-1, 1], up to 20% more at
        edges: bicubic scaling overshoots, and the reference does not cut that off.

    Raises:
        RequestError: no such tier, or too small a clip.
    """
    rows, columns = frames_FYX3.shape[1:3]
    canvas = action_canvas(rows, columns, tier)
    content = content_size(rows, columns, canvas)
    frames_CFYX = stretch(frames_FYX3[:num_frames], *floored(rows, columns))
    frames_FCYX = frames_CFYX.permute(1, 0, 2, 3)
    if tuple(content) != tuple(frames_FCYX.shape[2:]):
        frames_FCYX = F.interpolate(frames_FCYX, tuple(content), mode="bicubic", align_corners=False, antialias=True)
    down, right = canvas.height - content.height, canvas.width - content.width
    if right or down:
        # A mirror image has one row and column less than the picture; wider padding repeats the edge instead.
        mode = "replicate" if right >= content.width or down >= content.height else "reflect"
        frames_FCYX = F.pad(frames_FCYX, (0, right, 0, down), mode=mode)
    missing = num_frames - len(frames_FCYX)
    if missing > 0:
        frames_FCYX = torch.cat([frames_FCYX, frames_FCYX[-1:].expand(missing, -1, -1, -1)])
    return frames_FCYX.permute(1, 0, 2, 3).contiguous(), content
