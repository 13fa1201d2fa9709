"""What a video file really holds, found by decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from cosmos3_core.errors import MediaError
from cosmos3_core.media.pixels import Frames

YUV_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


@dataclass(frozen=True)
class VideoInfo:
    """The facts about a file's first video stream.

    Attributes:
        num_frames: frames that decode.
        fps: frames per second, exact.
        height, width: pixels.
        duration_s: seconds, the last frame's display time included.
        codec: FFmpeg's name for it, such as ``"h264"``.
        pixel_format: FFmpeg's name for it, such as ``"yuv420p"``.
    """

    num_frames: int
    fps: Fraction
    height: int
    width: int
    duration_s: float
    codec: str
    pixel_format: str


def probe_video(path: str | Path) -> VideoInfo:
    """Decode the whole file and report what was in it.

    Raises:
        MediaError: there is no such file, it holds no video, or not every frame that it names decodes.
    """
    try:
        with av.open(str(Path(path).absolute())) as container:
            stream = _video_stream(container, path)
            num_frames = sum(1 for _ in container.decode(stream))
            fps = stream.average_rate
            if not num_frames or not fps:
                raise MediaError(f"{path}: the video stream has no frames, or does not say how fast they follow")
            if stream.frames not in (0, num_frames):  # 0: the file does not state it
                raise MediaError(f"{path}: damaged: {num_frames} of the {stream.frames} frames it names can be decoded")
            # Files written as fragments do not state a duration.
            duration_s = num_frames / fps
            if stream.duration and stream.time_base:
                duration_s = stream.duration * stream.time_base
            context = stream.codec_context
            return VideoInfo(
                num_frames=num_frames,
                fps=fps,
                height=context.height,
                width=context.width,
                duration_s=float(duration_s),
                codec=context.codec.canonical_name,
                pixel_format=context.pix_fmt or "unknown",
            )
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def read_frames(path: str | Path) -> Iterator[Frames]:
    """Decode a video's frames one by one, as uint8 RGB [Y, X, 3].

    Files tagged with their colour matrix (ours are) are converted by it; untagged ones as BT.601, FFmpeg's default.

    Raises:
        MediaError: as :func:`probe_video`, when the iterator gets there.
    """
    reformatter = VideoReformatter()
    try:
        with av.open(str(Path(path).absolute())) as container:
            for frame in container.decode(_video_stream(container, path)):
                rgb = reformatter.reformat(
                    frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=YUV_TO_RGB, threads=1
                )
                yield np.asarray(rgb.to_ndarray(), dtype=np.uint8)
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def _video_stream(container: InputContainer, path: str | Path) -> VideoStream:
    if not container.streams.video:
        raise MediaError(f"{path}: there is no video stream in this file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _unreadable(path: str | Path, error: Exception) -> MediaError:
    return MediaError(f"{path}: not a video that can be decoded to its end: {error}")
