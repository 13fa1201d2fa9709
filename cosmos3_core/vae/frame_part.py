"""Which part of every frame the video VAE works on: all of it, or one of several parts that are worked on at once.

What a part needs of the others goes through a :class:`FramePart`, which travels with the clip in its
:class:`cosmos3_core.vae.video_blocks.FrameCache`. How the others are reached is its own affair.

``_HW`` ends a tensor whose last axes are rows and columns, whatever stands in front; K, H, W, C as in
:mod:`cosmos3_core.vae.video_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor


class FramePart(Protocol):
    """One part of the frames of one grid. Where frames are cut is a row or column of latents, at every level."""

    @property
    def axis(self) -> int | None:
        """The axis that is cut: -2 for rows, -1 for columns; None where nothing is, and beyond the frame are zeros."""

    def cut(self, x_HW: Tensor, scale: int = 1) -> Tensor:
        """Cut this part out of whole frames, a view; without rows or columns where there is nothing to do here.

        Args:
            x_HW: [..., scale x rows of latents, scale x columns of latents].
            scale: pixels per latent row or column.

        Raises:
            RequestError: frames of another grid.
        """

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the largest part of a grid of latents: the same for every part.

        Raises:
            RequestError: another grid.
        """

    def fill_border(self, x_HW: Tensor, *, before: int, after: int) -> None:
        """Write what lies beside this part into the border of ``x``; beyond the frame's edge it is left alone.

        All parts come here with the same borders, each when its part is there.

        Args:
            x_HW: this part inside a border along :attr:`axis`, changed in place.
            before: rows (columns) of the border above (to the left); 0 or 1.
            after: below (to the right); 0 or 1.
        """

    def gather(self, x_KHWC: Tensor) -> Tensor:
        """Whole frames of what each part holds, [K, own H, own W, C] -> [K, H, W, C], for every part that works."""

    def share(self, x_HW: Tensor) -> Tensor:
        """Whole frames of what each part holds, for all alike, those without anything to do included."""


class Whole:
    """All of the frame: there are no others."""

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

PartOf: TypeAlias = Callable[[int, int], FramePart]
"""Rows and columns of latents -> which part of such frames to work on."""


def whole_frame(height: int, width: int) -> FramePart:
    """:data:`WHOLE`, whatever the frame."""
    return WHOLE
