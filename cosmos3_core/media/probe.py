"""Finds the real content of a video or sound file by decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from cosmos3_core.errors import MediaError
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.sound import Samples

_YUV_TO_RGB = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
)


@dataclass(frozen=True)
class SoundInfo:
    """The facts about a file's first sound track.

    Attributes:
        codec: FFmpeg's name for it, such as ``"aac"``.
        sampling_rate: samples per second and channel (Hz).
        num_channels: 1 is mono, 2 is stereo.
        num_samples: samples per channel that a player presents, without the encoder's delay and padding.
        duration_s: their duration, seconds.
    """

    codec: str
    sampling_rate: int
    num_channels: int
    num_samples: int
    duration_s: float


@dataclass(frozen=True)
class VideoInfo:
    """The facts about a file's first video stream, and its sound.

    Attributes:
        num_frames: frames that decode.
        fps: frames per second, exact.
        height, width: pixels.
        duration_s: seconds, the last frame's display time included.
        codec: FFmpeg's name for it, such as ``"h264"``.
        pixel_format: FFmpeg's name for it, such as ``"yuv420p"``.
        sound: the first sound track; None without one.
    """

    num_frames: int
    fps: Fraction
    height: int
    width: int
    duration_s: float
    codec: str
    pixel_format: str
    sound: SoundInfo | None = None


def probe_video(path: str | Path) -> VideoInfo:
    """Decode the whole file and report its content.

    Raises:
        MediaError: the file is missing, holds no video, or is damaged.
    """
    sound = probe_sound(path)
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
                sound=sound,
            )
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def probe_sound(path: str | Path) -> SoundInfo | None:
    """Decode a file's first sound track and report its content; None without one.

    Raises:
        MediaError: the file is missing, or its sound is damaged.
    """
    try:
        with av.open(str(Path(path).absolute())) as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            num_samples = sum(chunk.shape[1] for chunk in _decode_presented(container, stream, path))
            return SoundInfo(
                codec=stream.codec_context.codec.canonical_name,
                sampling_rate=stream.codec_context.sample_rate,
                num_channels=stream.codec_context.layout.nb_channels,
                num_samples=num_samples,
                duration_s=num_samples / stream.codec_context.sample_rate,
            )
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def read_sound(path: str | Path) -> Samples:
    """Decode a file's first sound track, float32 [channels, samples] in about [-1, 1].

    The samples are those that a player presents, from the first to the last.

    Raises:
        MediaError: see :func:`probe_sound`; or the file has no sound.
    """
    try:
        with av.open(str(Path(path).absolute())) as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: there is no sound in this file")
            chunks = list(_decode_presented(container, container.streams.audio[0], path))
            if not chunks:
                raise MediaError(f"{path}: the sound track is empty")
            return np.concatenate(chunks, axis=1)
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def _decode_presented(container: InputContainer, stream: AudioStream, path: str | Path) -> Iterator[Samples]:
    """Yield the samples that a player presents, in chunks [channels, n]."""
    # FFmpeg drops the samples that an mp4's edit list puts before time 0, but not those past its end: the last AAC
    # frame is padded. Other formats' durations may be estimates; those of mp4 are exact.
    num_left = None
    if "mp4" in container.format.name and stream.duration and stream.time_base:
        num_left = round(stream.duration * stream.time_base * stream.codec_context.sample_rate)
    num_stated = num_left
    resampler = av.AudioResampler(format="fltp")  # planes of float32 from any codec
    for frame in container.decode(stream):
        for planes in resampler.resample(frame):
            chunk = np.asarray(planes.to_ndarray(), dtype=np.float32)[:, :num_left]
            num_left = None if num_left is None else num_left - chunk.shape[1]
            yield chunk
    if num_left:
        raise MediaError(f"{path}: damaged: {num_left} of the {num_stated} samples of sound it names cannot be decoded")


def read_frames(path: str | Path) -> Iterator[Frames]:
    """Decode a video's frames one by one, as uint8 RGB [Y, X, 3].

    Raises:
        MediaError: see :func:`probe_video`; the iterator raises it at the damaged frame.
    """
    reformatter = VideoReformatter()
    try:
        with av.open(str(Path(path).absolute())) as container:
            for frame in container.decode(_video_stream(container, path)):
                yield frame_to_rgb(frame, reformatter)
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def frame_to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> Frames:
    """Convert a frame to uint8 RGB [Y, X, 3] by its colour matrix; untagged ones as BT.601, FFmpeg's default."""
    rgb = reformatter.reformat(
        frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_YUV_TO_RGB, threads=1
    )
    return np.asarray(rgb.to_ndarray(), dtype=np.uint8)


def _video_stream(container: InputContainer, path: str | Path) -> VideoStream:
    if not container.streams.video:
        raise MediaError(f"{path}: there is no video stream in this file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _unreadable(path: str | Path, error: Exception) -> MediaError:
    return MediaError(f"{path}: not a video that can be decoded to its end: {error}")
