"""Decoded pixels on their way off the device: bytes already there, copied beside the next chunk's work.

Shape letters: C channels, F/Y/X pixel frames, rows, columns; a 1 is an axis of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cosmos3_core.device import HostCopies
from cosmos3_core.media.pixels import Frames, to_uint8


def frames_on_host(chunks: Iterator[Tensor], copies: HostCopies) -> Iterator[Frames]:
    """Chunks of pixels as uint8 frames on the CPU, one for one.

    Where the device works beside the CPU, the next chunk is begun before this one is handed out, so that the device
    does not wait for the copy: but for the first, which somebody is waiting for.

    Args:
        chunks: [1, 3, F, Y, X] in [-1, 1], of one device.
        copies: buffers to copy into; nobody else's while this iterator runs.

    Yields:
        uint8 RGB [F, Y, X, 3]; good until the next item is asked for.
    """
    copying = None
    for index, pixels_1CFYX in enumerate(chunks):
        begun = copies.begin(to_uint8(pixels_1CFYX))
        del pixels_1CFYX
        if index == 0 or not copies.is_asynchronous:
            yield begun()
            continue
        if copying is not None:
            yield copying()
        copying = begun
    if copying is not None:
        yield copying()
