"""Encodes a request's image or clip to the latents of the frames that it fixes. Nothing else uses the VAE's encoder.

Shape letters: C channels, T/H/W latent grid, F/Y/X pixel frames, rows, columns; a 1 is an axis of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_core.conditioning.modes import Resizing
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.conditioning.resize import crop_to_fill, fit_and_pad, stretch
from cosmos3_core.media.pixels import Frames
from cosmos3_core.vae.frame_part import ChoosePart, whole_frame
from cosmos3_core.vae.video import VideoVAE


def clean_latents(
    vae: VideoVAE, picture: PictureCondition, frames_FYX3: Frames, part_of: ChoosePart = whole_frame
) -> Tensor:
    """Encode the given frames.

    Args:
        vae: a VAE with its encoder.
        frames_FYX3: the picture's frames, from :func:`cosmos3_core.conditioning.picture.read_picture`.
        part_of: chooses the part of the frames to encode here; every part returns the latents of the whole.

    Returns:
        [1, C, len(picture.clean_frames), H, W], fp32, on the VAE's device.
    """
    pixels_CFYX = conditioning_pixels(picture, frames_FYX3)
    side = vae.geometry.spatial
    part = part_of(pixels_CFYX.shape[2] // side, pixels_CFYX.shape[3] // side)
    latents_1CTHW = vae.encode(pixels_CFYX.unsqueeze(0), part=part).float()
    rows, columns = picture.height // side, picture.width // side  # without the padding of a canvas
    return latents_1CTHW[:, :, list(picture.clean_frames), :rows, :columns]


def conditioning_pixels(picture: PictureCondition, frames_FYX3: Frames) -> Tensor:
    """Resize the given frames for the encoder: [3, F, Y, X] fp32 on the CPU, F = ``picture.num_frames``."""
    if picture.resizing is Resizing.PAD:
        pixels_CFYX, _ = fit_and_pad(frames_FYX3, picture.resolution_tier, picture.num_frames)
        return pixels_CFYX
    if picture.resizing is Resizing.CROP:
        cropped = [crop_to_fill(frame_YX3, picture.height, picture.width) for frame_YX3 in frames_FYX3]
        pixels_CFYX = torch.stack(cropped, dim=1)
    else:
        pixels_CFYX = stretch(frames_FYX3, picture.height, picture.width)
    missing = picture.num_frames - pixels_CFYX.shape[1]
    if missing > 0:
        pixels_CFYX = torch.cat([pixels_CFYX, pixels_CFYX[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return pixels_CFYX
