"""Resizes given pictures for the model: one policy each for an image, a clip and a clip with actions.

Source: diffusers 0.42.1, ``_preprocess_conditioning_image``, ``VideoProcessor.preprocess_video`` and
``_prepare_action_video_conditioning``: the same operations in the same order, so that the pixels are the same.

Shape letters: C channels, F/Y/X pixel frames, rows, columns. All results are fp32 on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosmos3_core.conditioning.canvas import Canvas, action_canvas, content_size, covering_size, floor_size
from cosmos3_core.media.pixels import Frames


def crop_to_fill(image_YX3: Frames, height: int, width: int) -> Tensor:
    """Scale an image until it covers the target, and crop it around the centre (image to video).

    Args:
        image_YX3: uint8 RGB.
        height, width: pixels of the result.

    Returns:
        [3, Y, X] in [-1, 1], rounded to 256 values after scaling.
    """
    # A copy: the array may be read-only, which PyTorch does not support.
    source_1CYX = torch.from_numpy(image_YX3.copy()).permute(2, 0, 1)[None].float()
    rows, columns, _ = image_YX3.shape
    covering = covering_size(rows, columns, height, width)
    scaled_CYX = F.interpolate(source_1CYX, tuple(covering), mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = round((covering.height - height) / 2), round((covering.width - width) / 2)
    # 256 values, as in the bytes of a picture.
    return scaled_CYX[:, top : top + height, left : left + width].round().clamp(0, 255) / 127.5 - 1.0


def stretch(frames_FYX3: Frames, height: int, width: int) -> Tensor:
    """Stretch each frame of a clip to the target, regardless of proportions (video to video).

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
    """Shrink a clip's frames to fit the canvas of their tier, and mirror them beyond their edges (modes with actions).

    Args:
        frames_FYX3: uint8 RGB, at least 16 x 16. The last is repeated where there are fewer than ``num_frames``.
        tier: one of :data:`cosmos3_core.conditioning.canvas.ACTION_TIERS`.
        num_frames: frames of the result.

    Returns:
        [3, F, Y, X] on the canvas, and the rows and columns that the clip fills. In [-1, 1], up to 20% more at edges:
        bicubic scaling overshoots, and the reference does not clamp it.

    Raises:
        RequestError: the tier is unknown, or the clip is too small.
    """
    rows, columns = frames_FYX3.shape[1:3]
    canvas = action_canvas(rows, columns, tier)
    content = content_size(rows, columns, canvas)
    down, right = canvas.height - content.height, canvas.width - content.width
    # A reflection lacks the row and column at the edge, so it is narrower than the picture; wider padding replicates.
    padding = "reflect" if right < content.width and down < content.height else "replicate"
    pixels_CFYX = torch.empty((3, num_frames, *canvas), dtype=torch.float32)
    for index, frame_YX3 in enumerate(frames_FYX3[:num_frames]):
        # Frame by frame: a whole clip would take several times its memory.
        frame_1CYX = stretch(frame_YX3[None], *floor_size(rows, columns)).permute(1, 0, 2, 3)
        if tuple(frame_1CYX.shape[2:]) != tuple(content):
            frame_1CYX = F.interpolate(frame_1CYX, tuple(content), mode="bicubic", align_corners=False, antialias=True)
        pixels_CFYX[:, index] = F.pad(frame_1CYX, (0, right, 0, down), mode=padding)[0]
    num_given = min(len(frames_FYX3), num_frames)
    pixels_CFYX[:, num_given:] = pixels_CFYX[:, num_given - 1 : num_given]
    return pixels_CFYX, content
