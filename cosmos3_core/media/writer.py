"""The file of a result and its writer: an mp4, an image or a wav, written chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.file_kinds import DEFAULT_CRF, DEFAULT_QUALITY, FILE_KINDS, IMAGE_KINDS, MEDIA_TYPES, SUFFIXES
from cosmos3_core.media.image import check_image, write_image
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.output import MediaWriter, Target
from cosmos3_core.media.pixels import Frames, check_frames
from cosmos3_core.media.sound import Samples, WavWriter, sound_error
from cosmos3_core.media.sound import SoundFormat as SoundFormat


@dataclass(frozen=True)
class ClipFormat:
    """The format of a result's file.

    Attributes:
        kind: one of :data:`cosmos3_core.media.file_kinds.FILE_KINDS`; an image holds a single frame.
        height, width: pixels; ignored for a wav.
        fps: frames per second of an mp4.
        crf: H.264 quality of an mp4, see :data:`DEFAULT_CRF`.
        lossless: store the yuv420p planes of an mp4 exactly.
        sound: the sound track of an mp4, or None; a wav needs one, an image has none.
        quality: of jpeg and webp, 0 to 100 (best); webp is lossless at 100.

    Raises:
        RequestError: the kind is unknown, or does not go with the sound. :func:`open_writer` checks the numbers.
    """

    kind: str
    height: int
    width: int
    fps: float
    crf: float = DEFAULT_CRF
    lossless: bool = False
    sound: SoundFormat | None = None
    quality: int = DEFAULT_QUALITY

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, FILE_KINDS)
        if self.kind == "wav" and self.sound is None:
            raise RequestError("sound", None, "a SoundFormat", "a wav holds nothing but sound")
        if self.is_image and self.sound is not None:
            raise RequestError("sound", self.sound, f"None for a {self.kind}", "sound goes into an mp4 or a wav")

    @property
    def is_image(self) -> bool:
        """Whether the file holds a single frame."""
        return self.kind in IMAGE_KINDS

    @property
    def has_pictures(self) -> bool:
        """Whether the file holds frames: all kinds but a wav."""
        return self.kind != "wav"

    @property
    def has_live_file(self) -> bool:
        """Whether the file can be watched while it grows: an mp4."""
        return self.kind == "mp4"

    @property
    def media_type(self) -> str:
        """MIME type of the file."""
        return MEDIA_TYPES[self.kind]

    @property
    def suffix(self) -> str:
        """Ending of the file's name."""
        return SUFFIXES[self.media_type]


class DiscardWriter(MediaWriter):
    """Writes nothing: the writer of ranks whose frames another rank writes."""

    def write(self, frames: Frames) -> None:
        """Drop the frames."""

    def write_sound(self, samples: Samples) -> None:
        """Drop the samples."""

    def close(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


class ImageWriter(MediaWriter):
    """Writes one frame as a png, jpeg or webp when it is closed; see :func:`write_image`.

    Args:
        quality: of jpeg and webp, 0 to 100 (best).

    Raises:
        RequestError: a setting is out of range.
    """

    def __init__(self, target: Target, kind: str, *, height: int, width: int, quality: int = DEFAULT_QUALITY) -> None:
        check_image(kind, height, width, quality)
        self._target, self._kind, self._quality = target, kind, quality
        self._height, self._width = height, width
        self._frame: Frames | None = None

    def write(self, frames: Frames) -> None:
        """Take the frame, uint8 [1, Y, X, 3].

        Raises:
            RequestError: the frame has another shape, or is the second one.
            ClosedError: the writer was closed.
        """
        self._require_open()
        check_frames(frames, height=self._height, width=self._width)
        if self._frame is not None or len(frames) != 1:
            raise RequestError("frames", len(frames), "one frame in all", "write a clip as an mp4")
        self._frame = frames[0]

    def write_sound(self, samples: Samples) -> None:
        """Raise RequestError: an image takes no sound."""
        raise sound_error(self._kind)

    def close(self) -> None:
        """Write the file; idempotent.

        Raises:
            MediaError: there was no frame, or the file could not be written.
        """
        if self._is_open:
            self._is_open = False
            if self._frame is None:
                raise MediaError("no frame was written, so there is no image; write one before close()")
            write_image(self._target, self._frame, self._kind, self._quality)

    def abort(self) -> None:
        """Close the writer; there is no file yet."""
        self._is_open = False


def open_writer(target: Target, clip_format: ClipFormat, live: str | Path | None = None) -> MediaWriter:
    """Open the writer for a format.

    Args:
        target: the file's path with its suffix, or a binary stream.
        live: path of an mp4's live file, see :class:`Mp4Writer`.

    Raises:
        RequestError: a setting is out of range.
        MediaError: the encoder or the file could not be opened.
    """
    if clip_format.kind == "wav":
        assert clip_format.sound is not None  # ClipFormat checks it
        return WavWriter(target, clip_format.sound)
    if clip_format.is_image:
        return ImageWriter(
            target,
            clip_format.kind,
            height=clip_format.height,
            width=clip_format.width,
            quality=clip_format.quality,
        )
    return Mp4Writer(
        target,
        fps=clip_format.fps,
        height=clip_format.height,
        width=clip_format.width,
        crf=clip_format.crf,
        lossless=clip_format.lossless,
        sound=clip_format.sound,
        live=live,
    )
