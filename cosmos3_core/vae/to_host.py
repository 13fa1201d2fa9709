"""Copies decoded pixels off the device: as bytes, while the next chunk is computed.

Shape letters: C channels, F/Y/X pixel frames, rows, columns; a 1 is an axis of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cosmos3_core.device import HostCopies
from cosmos3_core.media.pixels import Frames, to_uint8


def frames_on_host(chunks: Iterator[Tensor], copies: HostCopies) -> Iterator[Frames]:
    """Convert each chunk of pixels to uint8 frames on the CPU.

    On a GPU the next chunk begins before this one is yielded, so that the device does not wait for the copy; except
    after the first chunk, which the caller needs at once.

    Args:
        chunks: [1, 3, F, Y, X] in [-1, 1], on one device.
        copies: buffers to copy into, for this iterator alone.

    Yields:
        uint8 RGB [F, Y, X, 3], valid until the next item.
    """
    pending = None
    for index, pixels_1CFYX in enumerate(chunks):
        copy = copies.begin(to_uint8(pixels_1CFYX))
        del pixels_1CFYX
        if index == 0 or not copies.is_asynchronous:
            yield copy()
            continue
        if pending is not None:
            yield pending()
        pending = copy
    if pending is not None:
        yield pending()
