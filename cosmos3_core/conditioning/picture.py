"""The image or clip that a request gives: its header, the part of it that is encoded, and its frames. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosmos3_core.conditioning.canvas import covering_size
from cosmos3_core.conditioning.modes import IMAGE_FIELD, VIDEO_FIELD, Resizing
from cosmos3_core.errors import RequestError
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.source import ClipInfo, Packed, probe_image, read_clip, read_image
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest

ReadClip = Callable[..., Frames]
"""The signature of :func:`read_clip`."""


@dataclass(frozen=True)
class GivenPicture:
    """The image or clip that a request gives, and what its header says.

    Attributes:
        kind: the request's field, "image" or "video".
        media: the file's bytes, or uint8 RGB frames.
        height, width: pixels, upright.
        num_frames: pixel frames of a clip; None for an image, or where the header lacks them.
    """

    kind: str
    media: Packed
    height: int
    width: int
    num_frames: int | None

    def check_memory(self, resizing: Resizing, num_frames: int, onto: tuple[int, int]) -> None:
        """Refuse a picture that takes too much memory, as scaled or as encoded.

        Args:
            num_frames: pixel frames to encode.
            onto: rows and columns of pixels after resizing.

        Raises:
            RequestError: it takes too much memory.
        """
        rows, columns = onto
        if resizing is Resizing.CROP:
            rows, columns = covering_size(self.height, self.width, rows, columns)
            if rows * columns > LIMITS.max_image_pixels:
                size = f"{self.width} x {self.height} pixels"
                covered = f"{onto[1]} x {onto[0]}, which it covers when scaled to {columns} x {rows}"
                raise RequestError(self.kind, size, f"of a shape nearer to {covered}", "cut it first")
        if num_frames * rows * columns > LIMITS.max_clip_total_pixels:
            allowed = f"at most {LIMITS.max_clip_total_pixels} pixels in all, of {columns} x {rows} each"
            raise RequestError("frames to encode", num_frames, allowed, "ask for fewer, or a smaller size")


@dataclass(frozen=True)
class PictureCondition:
    """The part of a request's image or clip that is encoded: a value for the process with the VAE.

    Attributes:
        kind: the request's field, "image" or "video".
        media: the file's bytes, or uint8 RGB frames.
        resizing: how it is resized.
        height, width: pixels of the generated pictures; with ``Resizing.PAD`` the rest of the canvas is cut off as
            latents.
        resolution_tier: tier of the canvas that ``Resizing.PAD`` fits into; 0 otherwise.
        num_frames: pixel frames to encode, 1 + a multiple of the temporal compression; the last frame of a shorter
            clip is repeated.
        keep: "first" or "last" frames of a longer clip.
        clean_frames: latent frames that the picture fixes, ascending; all are among those encoded.
    """

    kind: str
    media: Packed = field(compare=False, repr=False)
    resizing: Resizing
    height: int
    width: int
    resolution_tier: int
    num_frames: int
    keep: str
    clean_frames: tuple[int, ...]


def probe_picture(request: GenerationRequest, probe: Callable[[str, Packed], ClipInfo]) -> GivenPicture | None:
    """Read the header of a request's image or clip; None without one.

    Args:
        request: with its media packed.

    Raises:
        RequestError: it cannot be read, or is not packed: a path would be opened on this machine, not on the caller's.
    """
    kind = IMAGE_FIELD if request.image is not None else VIDEO_FIELD
    media: Any = getattr(request, kind)
    if media is None:
        return None
    if not isinstance(media, bytes | np.ndarray):
        raise RequestError(kind, type(media).__name__, "a file's bytes, or frames", "call packed() on the request")
    if kind == IMAGE_FIELD:
        image = probe_image(kind, media)
        return GivenPicture(kind, media, image.height, image.width, None)
    clip = probe(kind, media)
    return GivenPicture(kind, media, clip.height, clip.width, clip.num_frames)


def read_picture(picture: PictureCondition, *, read: ReadClip = read_clip) -> Frames:
    """Read the frames to encode, before they are resized: uint8 RGB [F, Y, X, 3].

    The VAE is causal, so only the frames up to the last given one are read.

    Args:
        read: reads a clip; a service does that in another process.

    Raises:
        RequestError: the media is damaged, or larger than allowed.
    """
    if picture.kind == IMAGE_FIELD:
        return read_image(picture.kind, picture.media)[None]
    return read(picture.kind, picture.media, num_frames=picture.num_frames, keep=picture.keep)
