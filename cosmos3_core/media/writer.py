"""What a clip becomes: an mp4, or a png where it has one frame. Both writers take chunks as they come."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.image import write_png
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.output import Target
from cosmos3_core.media.pixels import Frames, check_frames


@dataclass(frozen=True)
class ClipFormat:
    """The file to make.

    Attributes:
        is_image: a png of the only frame; else an mp4.
        height, width: pixels.
        fps: frames per second; no matter for an image.
        crf: H.264 quality, 0 (best) to 51.
        lossless: store the yuv420p planes exactly.
    """

    is_image: bool
    height: int
    width: int
    fps: float
    crf: float = 18
    lossless: bool = False

    @property
    def media_type(self) -> str:
        """MIME type of the file."""
        return "image/png" if self.is_image else "video/mp4"

    @property
    def suffix(self) -> str:
        """Ending of the file's name."""
        return ".png" if self.is_image else ".mp4"


class MediaWriter(Protocol):
    """A file in the making; a context manager that leaves no file when it is left by an exception."""

    def write(self, frames: Frames) -> None:
        """Add uint8 frames [F, Y, X, 3]."""

    def close(self) -> None:
        """Finish the file and give it its name; does nothing the second time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PngWriter:
    """Writes one frame as a png when it is closed.

    Args:
        target: a path in an existing directory, or a binary stream.
        height, width: pixels of the frame.
    """

    def __init__(self, target: Target, *, height: int, width: int) -> None:
        self._target = target
        self._height, self._width = height, width
        self._frame: Frames | None = None
        self._is_open = True

    def write(self, frames: Frames) -> None:
        """Take the frame, uint8 [1, Y, X, 3].

        Raises:
            RequestError: another shape, or a second frame.
            ClosedError: the writer was closed.
        """
        if not self._is_open:
            raise ClosedError("this PngWriter is closed; open a new one to write another file")
        check_frames(frames, height=self._height, width=self._width)
        if self._frame is not None or len(frames) != 1:
            raise RequestError("frames", len(frames), "one frame in all", "Write a clip as an mp4.")
        self._frame = frames[0]

    def close(self) -> None:
        """Write the file. Does nothing the second time.

        Raises:
            MediaError: no frame was written, or the file could not be.
        """
        if self._is_open:
            self._is_open = False
            if self._frame is None:
                raise MediaError("no frame was written, so there is no image; write one before close()")
            write_png(self._target, self._frame)

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._is_open = False


def open_writer(target: Target, clip_format: ClipFormat) -> MediaWriter:
    """The writer for a format.

    Args:
        target: the file's path, ending and all, or a binary stream.
        clip_format: what to make.

    Raises:
        RequestError: a setting is out of range.
        MediaError: the encoder or the file could not be opened.
    """
    if clip_format.is_image:
        return PngWriter(target, height=clip_format.height, width=clip_format.width)
    return Mp4Writer(
        target,
        fps=clip_format.fps,
        height=clip_format.height,
        width=clip_format.width,
        crf=clip_format.crf,
        lossless=clip_format.lossless,
    )
