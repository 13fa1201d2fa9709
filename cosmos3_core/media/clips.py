"""Reads clips with FFmpeg, from memory: no content of a file makes FFmpeg open another one. No torch here.

Frames are upright: the display matrix of the file (a phone's rotation) is applied. The shape of pixels is ignored.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from cosmos3_core.errors import RequestError
from cosmos3_core.media.kinds import CLIP_KINDS_TEXT, FileKind, damage_error, refuse_failures, with_article
from cosmos3_core.media.mp4_index import NoVideoTrack, TooManySamples, blank_other_tracks
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.probe import frame_to_rgb
from cosmos3_core.media.stills import PictureSize, check_pixels
from cosmos3_core.presets import LIMITS

# Each decoding thread would hold frames of its own, and damaged streams provoke races between threads.
_NUM_THREADS = 1


@dataclass(frozen=True)
class OpenClip:
    """A file's video stream, ready to be decoded once.

    Attributes:
        field: the request's field, for errors.
        kind: kind of the file.
        container, stream: FFmpeg's.
        num_frames: number of frames shown, from the header; None if the header lacks it.
    """

    field: str
    kind: FileKind
    container: InputContainer
    stream: VideoStream
    num_frames: int | None

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yield the frames in the order shown, not converted.

        Raises:
            RequestError: the clip is damaged or over a limit, or a frame's size differs from the first's.
        """
        first: tuple[int, int] | None = None
        count = 0
        with refuse_failures(self.field, with_article(f"{self.kind.name} file"), "a clip that can be decoded"):
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt:
                    raise damage_error(self.field, self.kind.name, f"the data of frame {count} are cut off")
                for frame in packet.decode():
                    picture = frame.height, frame.width
                    first = first or picture
                    check_pixels(self.field, PictureSize(*picture), LIMITS.max_clip_pixels)
                    if picture != first:
                        given = f"a clip whose frame {count} is {frame.width} x {frame.height}"
                        raise RequestError(self.field, given, f"a clip of one size, {first[1]} x {first[0]}")
                    if frame.is_corrupt:
                        raise damage_error(self.field, self.kind.name, f"frame {count} decodes in part only")
                    count += 1
                    if count > LIMITS.max_clip_frames:
                        raise too_many_frames_error(self.field, f"over {LIMITS.max_clip_frames}")
                    yield frame

    def to_rgb(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> Frames:
        """Convert to uint8 RGB [Y, X, 3], upright, with the colours of :func:`frame_to_rgb`.

        Raises:
            RequestError: FFmpeg cannot convert its colours.
        """
        try:
            pixels = frame_to_rgb(frame, reformatter)
        except av.FFmpegError as error:
            given = f"a clip with colour matrix {int(frame.colorspace)} ({error.strerror})"
            raise RequestError(
                self.field, given, "RGB, BT.601, BT.709, BT.2020 or the like", "convert it first"
            ) from error
        is_swapped, flips_rows, flips_columns = _read_rotation(frame)
        if is_swapped:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]


@contextlib.contextmanager
def open_clip(field: str, kind: FileKind, data: bytes) -> Iterator[OpenClip]:
    """Read a file's header and check the sizes in it.

    Args:
        kind: kind of the file, of category "clip".

    Raises:
        RequestError: the file has no video stream, too many or too large frames, is cut off, or not readable.
    """
    # FFmpeg counts rows after padding them to 64 pixels; frames() counts exactly.
    max_pixels = {"max_pixels": str(2 * LIMITS.max_clip_pixels)}
    with contextlib.ExitStack() as stack:
        with refuse_failures(field, with_article(f"{kind.name} file"), CLIP_KINDS_TEXT):
            if kind.demuxer == "mov":
                data = _blank_other_tracks(field, kind, data)
            container = stack.enter_context(
                av.open(
                    io.BytesIO(data),
                    mode="r",
                    format=kind.demuxer,
                    options=max_pixels | {"protocol_whitelist": "none"},
                    metadata_errors="replace",
                    io_open=_refuse_to_open,
                )
            )
            stream = _video_stream(field, kind, container)
            context = stream.codec_context
            if not context.height or not context.width:
                reason = f"no frame can be decoded, or the frames are larger than {LIMITS.max_clip_pixels} pixels"
                raise damage_error(field, kind.name, reason)
            check_pixels(field, PictureSize(context.height, context.width), LIMITS.max_clip_pixels)
            context.options = max_pixels  # a stream may change its size, or exceed its header's
            context.thread_count = _NUM_THREADS
            num_frames = _count_indexed_frames(field, kind, stream, len(data))
        yield OpenClip(field, kind, container, stream, num_frames)


def upright_size(frame: av.VideoFrame) -> PictureSize:
    """Return the rows and columns after the rotation in the file."""
    is_swapped, _, _ = _read_rotation(frame)
    return PictureSize(frame.width, frame.height) if is_swapped else PictureSize(frame.height, frame.width)


def too_many_frames_error(field: str, count: str | int) -> RequestError:
    """Return the error for a clip of ``count`` frames."""
    return RequestError(field, f"a clip of {count} frames", f"at most {LIMITS.max_clip_frames} frames", "cut it first")


def _blank_other_tracks(field: str, kind: FileKind, data: bytes) -> bytes:
    try:
        return blank_other_tracks(data)
    except TooManySamples as error:
        raise too_many_frames_error(field, error.args[0]) from error
    except NoVideoTrack as error:
        raise _no_video_stream(field, kind) from error


def _refuse_to_open(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    raise PermissionError("the file refers to another one")


def _video_stream(field: str, kind: FileKind, container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a song's cover is no clip
            if stream.codec_context is None:
                raise RequestError(field, "a clip in an unknown codec", "H.264, HEVC, VP9, AV1 or another usual codec")
            return stream
    raise _no_video_stream(field, kind)


def _no_video_stream(field: str, kind: FileKind) -> RequestError:
    return RequestError(field, with_article(f"{kind.name} file with no video stream"), CLIP_KINDS_TEXT)


def _count_indexed_frames(field: str, kind: FileKind, stream: VideoStream, num_bytes: int) -> int | None:
    """Return the number of frames in the file's index; None without a full index, which the MP4 family has."""
    if kind.demuxer != "mov" or not len(stream.index_entries):
        count = stream.frames or None
        if count and count > LIMITS.max_clip_frames:
            raise too_many_frames_error(field, count)
        return None  # AVI has a count too, which is often wrong
    count = 0
    for entry in stream.index_entries:
        if entry.pos + entry.size > num_bytes:
            raise damage_error(field, kind.name, "it ends before its last frame")
        # Frames that an edit list cuts away are decoded but not shown.
        count += not entry.is_discard
    if count > LIMITS.max_clip_frames:
        raise too_many_frames_error(field, count)
    # A fragmented file has no total: FFmpeg has read only the first fragment's table.
    return count if stream.frames else None


def _read_rotation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Read the display matrix: (rows and columns swap, rows are then reversed, columns are then reversed)."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = a x + c y and y' = b x + d y, in 16.16 fixed point; FFmpeg, libavutil/display.h.
    a_, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if abs(b) > abs(a_):
        return True, b < 0, c < 0
    return False, d < 0, a_ < 0
