"""Pixels of :meth:`Engine.step` -> frames -> a file. The names match PhyAI's documentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.pixels import Frames, unit_to_uint8

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GeneratedMedia:
    """One generation's media on the CPU.

    Attributes:
        frames: uint8 RGB [F, Y, X, 3].
    """

    frames: Frames


class Cosmos3GenerationPostProcessor:
    """Turns an engine's pixels into files.

    Args:
        fps: frames per second of the clip.
    """

    def __init__(self, fps: float = 24.0) -> None:
        self.fps = fps

    def postprocess(self, pixels: Tensor) -> GeneratedMedia:
        """Pixels (1, 3, F, Y, X) in [0, 1] -> frames on the CPU.

        Raises:
            RequestError: another shape or dtype.
        """
        return GeneratedMedia(unit_to_uint8(pixels).cpu().numpy())

    def save_mp4(self, media: GeneratedMedia, path: str | Path) -> Path:
        """Write the frames as an H.264 mp4 and return its path.

        Raises:
            RequestError: the path is not in an existing directory.
            MediaError: the file could not be written.
        """
        _, height, width, _ = media.frames.shape
        with Mp4Writer(path, fps=self.fps, height=height, width=width) as writer:
            writer.write(media.frames)
        return Path(path)
