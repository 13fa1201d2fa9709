"""Pixels between the decoder and the encoder: float tensors -> uint8 frames, and a hash of the frames.

Shape letters: B batch, C channels, F/Y/X pixel frames, rows, columns. Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos3_core.errors import RequestError

if TYPE_CHECKING:
    import torch

Frames: TypeAlias = npt.NDArray[np.uint8]
"""RGB frames, uint8 [F, Y, X, 3]; a single frame is [Y, X, 3]."""


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Map decoded pixels from [-1, 1] to [0, 1], clamped; any shape, in the tensor's own dtype."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def to_uint8(pixels_BCFYX: torch.Tensor) -> torch.Tensor:
    """Convert one clip's decoded pixels to RGB bytes, on their device.

    The order of operations is that of diffusers' ``postprocess_video``: scaling and clamping in the tensor's own dtype,
    the product with 255 in fp32, halves rounded to even.

    Args:
        pixels_BCFYX: floating point [1, 3, F, Y, X], clamped to [-1, 1].

    Returns:
        uint8 [F, Y, X, 3], contiguous.

    Raises:
        RequestError: the tensor has another shape or dtype.
    """
    _check_pixels(pixels_BCFYX)
    return unit_to_uint8(to_unit(pixels_BCFYX))


def unit_to_uint8(unit_BCFYX: torch.Tensor) -> torch.Tensor:
    """Convert pixels [1, 3, F, Y, X] in [0, 1] to uint8 [F, Y, X, 3]; the second half of :func:`to_uint8`.

    Raises:
        RequestError: the tensor has another shape or dtype.
    """
    _check_pixels(unit_BCFYX)
    return (unit_BCFYX[0].float() * 255).round().byte().permute(1, 2, 3, 0).contiguous()


def _check_pixels(pixels_BCFYX: torch.Tensor) -> None:
    shape = tuple(pixels_BCFYX.shape)
    if len(shape) != 5 or shape[:2] != (1, 3):
        raise RequestError("pixels", shape, "a tensor [1, 3, F, Y, X]", "convert the clips of a batch one by one")
    if not pixels_BCFYX.is_floating_point():
        raise RequestError("pixels", str(pixels_BCFYX.dtype), "a floating point tensor")


def check_frames(frames: Any, *, height: int | None = None, width: int | None = None) -> None:
    """Make sure that ``frames`` is a uint8 array [F, Y, X, 3], of ``height`` rows and ``width`` columns if given.

    Raises:
        RequestError: it is not; the message has both shapes.
    """
    rows, columns = ("Y" if height is None else str(height)), ("X" if width is None else str(width))
    allowed = f"a uint8 array [F, {rows}, {columns}, 3]"
    if not isinstance(frames, np.ndarray):
        hint = "convert a tensor with to_uint8(pixels).cpu().numpy()"
        raise RequestError("frames", type(frames).__name__, allowed, hint)
    given = f"{frames.dtype} {list(frames.shape)}"
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise RequestError("frames", given, allowed)
    if height not in (None, frames.shape[1]) or width not in (None, frames.shape[2]):
        raise RequestError("frames", given, allowed)


class FrameHash:
    """SHA-256 over the RGB bytes of a clip's frames, in order.

    The digest equals that of ``all_frames.tobytes()``, however the frames are cut into chunks. It identifies the input
    of the encoder, so that two runs can be compared without their files.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, frames: Frames) -> None:
        """Add uint8 frames [F, Y, X, 3].

        Raises:
            RequestError: the frames have another dtype or shape.
        """
        check_frames(frames)
        self._sha256.update(np.ascontiguousarray(frames).data)

    def hexdigest(self) -> str:
        """Return the digest of all frames so far, 64 hexadecimal digits."""
        return self._sha256.hexdigest()
