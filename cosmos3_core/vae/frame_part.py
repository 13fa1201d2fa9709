"""The part of every frame that the video VAE works on: all of it, or one of several that run at the same time.

Parts exchange their borders through a :class:`FramePart`, which travels with the clip in its
:class:`cosmos3_core.vae.video_blocks.FrameCache` and hides the transport.

``_HW`` ends a tensor whose last axes are rows and columns, after any others; K, H, W, C as in
:mod:`cosmos3_core.vae.video_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor


class FramePart(Protocol):
    """One part of the frames of one grid, cut between rows or columns of latents at every level."""

    @property
    def axis(self) -> int | None:
        """The axis that is cut: -2 for rows, -1 for columns; None for the whole frame, with zeros beyond it."""

    def cut(self, x_HW: Tensor, scale: int = 1) -> Tensor:
        """Cut this part out of whole frames, a view; an empty part has no rows or columns.

        Args:
            x_HW: [..., scale x rows of latents, scale x columns of latents].
            scale: pixels per latent row or column.

        Raises:
            RequestError: the frames are of another grid.
        """

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the largest part of a grid of latents: the same for every part.

        Raises:
            RequestError: the part is of another grid.
        """

    def fill_border(self, x_HW: Tensor, *, before: int, after: int) -> None:
        """Fill the border of ``x`` from the neighbouring parts; it stays unchanged beyond the frame's edge.

        All parts call this with the same borders, each when its own part is computed.

        Args:
            x_HW: this part inside a border along :attr:`axis`, changed in place.
            before: rows (columns) of the border above (to the left); 0 or 1.
            after: rows (columns) of the border below (to the right); 0 or 1.
        """

    def gather(self, x_KHWC: Tensor) -> Tensor:
        """Join the parts to whole frames, [K, own H, own W, C] -> [K, H, W, C], on every part that is not empty."""

    def share(self, x_HW: Tensor) -> Tensor:
        """Join the parts to whole frames on every part, empty ones included."""


class Whole:
    """The whole frame, without other parts."""

    @property
    def axis(self) -> int | None:
        return None

    def cut(self, x_HW: Tensor, scale: int = 1) -> Tensor:
        return x_HW

    def largest(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def fill_border(self, x_HW: Tensor, *, before: int, after: int) -> None:
        pass

    def gather(self, x_KHWC: Tensor) -> Tensor:
        return x_KHWC

    def share(self, x_HW: Tensor) -> Tensor:
        return x_HW


WHOLE = Whole()

ChoosePart: TypeAlias = Callable[[int, int], FramePart]
"""(rows, columns of latents) -> the part of such frames to work on."""


def whole_frame(height: int, width: int) -> FramePart:
    """Return :data:`WHOLE` for any frame."""
    return WHOLE
