"""The part of a request's image or clip that is encoded, and its resizing: a value for the process with the VAE.

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cosmos3_core.conditioning.modes import IMAGE, Resizing
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.source import Packed, read_clip, read_image

ReadClip = Callable[..., Frames]
"""As :func:`read_clip`."""


@dataclass(frozen=True)
class PictureCondition:
    """The given picture of a request.

    Attributes:
        kind: the request's field, "image" or "video"; tells what ``media`` is.
        media: the file's bytes, or uint8 RGB frames.
        resizing: how it comes to size.
        height, width: pixels of the generated pictures; with ``Resizing.PAD`` what lies outside is cut off as latents.
        resolution_tier: of the canvas that ``Resizing.PAD`` fits into; 0 otherwise.
        num_frames: pixel frames to encode, 1 + a multiple of the temporal compression; a shorter clip ends with its
            last frame repeated.
        keep: "first" or "last" frames of a longer clip.
        clean_frames: latent frames to give, ascending; all are among those encoded.
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


def read_picture(picture: PictureCondition, *, read: ReadClip = read_clip) -> Frames:
    """Read the frames to encode as they come, before they are brought to size: uint8 RGB [F, Y, X, 3].

    The VAE is causal, so only the frames up to the last given one are read.

    Args:
        picture: what is given.
        read: how a clip is read; a service does that in another process.

    Raises:
        RequestError: the media is damaged, or larger than allowed.
    """
    if picture.kind == IMAGE:
        return read_image(picture.kind, picture.media)[None]
    return read(picture.kind, picture.media, num_frames=picture.num_frames, keep=picture.keep)
