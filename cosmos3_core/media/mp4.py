"""Writes frames and sound as an mp4, H.264 and AAC, whose bytes depend only on them and the settings.

Colour: RGB is read as full-range BT.709 and stored as limited-range BT.709 (luma 16..235); the stream and the container
are tagged with it. Chroma is the mean of each 2 x 2 block, as the chroma location tag ("center") says.

Reproducible: the frames' size decides the number of encoder threads, x264 must not choose algorithms by CPU model, and
the muxer writes neither dates nor library versions (x264 stores its own version and settings in the stream). Sound and
frames may come in any order: packets go into the file by decode time. FFmpeg's AAC encoder computes in floating point
and chooses routines by CPU model: its bytes are the same every time on one machine, but may differ on another.

A live file gets the same packets, so that a clip can be watched while it grows; it does not change the finished file.
"""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.aac import AacTrack, PacketInterleaver, check_aac
from cosmos3_core.media.file_kinds import DEFAULT_CRF, MAX_CRF
from cosmos3_core.media.live_mp4 import LiveMp4
from cosmos3_core.media.output import MediaWriter, OutputFile, Target, describe_failure
from cosmos3_core.media.pixels import Frames, check_frames
from cosmos3_core.media.sound import SampleCounter, Samples, SoundFormat, sound_error
from cosmos3_core.shapes import frame_rate

X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
"""x264's speed presets, fastest first."""

MAX_THREADS = 16
_PIXELS_PER_THREAD = 2**18

_AVCOL_SPC_BT709 = 1  # PyAV names swscale's values, not those of a codec context

# Area averaging is the exact 2 x 2 mean: luma and chroma equal the BT.709 formula within rounding. PyAV's default is
# slower, and its chroma is up to 30 levels off the mean on noise.
_RGB_TO_YUV = (
    Interpolation.AREA
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)

# chromaloc 1: a chroma sample lies in the centre of its block. The others shorten the encoder's lookahead: the first
# packet comes with frame 13 instead of 47. docs/performance.md has the cost.
_X264_PARAMS = "cpu-independent=1:chromaloc=1:rc-lookahead=10:sync-lookahead=1:force-cfr=1"

# The index moves to the front when the file is closed; "bitexact" leaves dates and library versions out.
_MUXER_OPTIONS = {"movflags": "faststart", "fflags": "+bitexact"}

_VIDEO, _SOUND = 0, 1  # tracks

# Failures of FFmpeg, the file system and the allocator, not our bugs.
_FAILURES = (av.FFmpegError, OSError, MemoryError)


def encoder_threads(height: int, width: int) -> int:
    """Return the number of threads that x264 works with on frames of this size: one up to 256 Ki pixels, four at 720p.

    Each thread holds some more frames and delays the first packet by a frame.
    """
    return min(-(-height * width // _PIXELS_PER_THREAD), MAX_THREADS)


class Mp4Writer(MediaWriter):
    """Writes one clip as an mp4: H.264, yuv420p, index in front ("faststart"); with sound, AAC-LC.

    Frames and samples come in chunks and are encoded at once; neither the cuts between chunks nor the order of frames
    and samples changes the file. The file appears when :meth:`close` returns. An exception in the ``with`` block, or a
    failure in :meth:`write` or :meth:`write_sound`, leaves no file except the unfinished live one. Not thread-safe.

    Args:
        fps: frames per second, from 1 to 240; see :func:`frame_rate`.
        height, width: pixels, both even.
        crf: x264's quality; see :data:`DEFAULT_CRF`.
        preset: x264's speed, one of :data:`X264_PRESETS`; slower makes smaller files.
        lossless: store the yuv420p planes exactly; ``crf`` is then ignored. Files are large and few players open them.
        threads: encoder threads, 1 to 16; the bytes depend on them, so they do not come from the machine. None:
            :func:`encoder_threads`.
        sound: the sound track, which starts with the first frame, at one of :data:`AAC_SAMPLING_RATES`. None leaves it
            out.
        live: path of a fragmented mp4 that grows from the first frames on, see :mod:`cosmos3_core.media.live_mp4`; its
            sound may last up to one AAC frame longer than the pictures.

    Attributes:
        num_frames: frames written so far.
        num_encoded: frames that the encoder has returned; it looks ahead over the others.

    Raises:
        RequestError: an argument is out of range.
        MediaError: the encoder or a file could not be opened.
        MemoryError: there is no memory for it, here and below.
    """

    def __init__(
        self,
        target: Target,
        *,
        fps: float | Fraction,
        height: int,
        width: int,
        crf: float = DEFAULT_CRF,
        preset: str = "medium",
        lossless: bool = False,
        threads: int | None = None,
        sound: SoundFormat | None = None,
        live: str | Path | None = None,
    ) -> None:
        rate = frame_rate(fps)
        _check_settings(height=height, width=width, crf=crf, preset=preset)
        if threads is None:
            threads = encoder_threads(height, width)
        threads = checks.integer("threads", threads, 1, MAX_THREADS)
        if sound is not None:
            check_aac(sound)
        self.num_frames = 0
        self.num_encoded = 0
        self._counter = None if sound is None else SampleCounter(sound)
        self._order = PacketInterleaver(1 if sound is None else 2)
        self._height, self._width = height, width
        self._frame_time_s = 1 / rate
        self._reformatter = VideoReformatter()
        self._live: LiveMp4 | None = None
        self._output = OutputFile(target)
        self._container = self._open_container(sound)
        try:
            quality = {"qp": "0"} if lossless else {"crf": f"{crf:g}"}
            options = {"preset": preset, "x264-params": _X264_PARAMS, **quality}
            self._video = self._container.add_stream("libx264", rate=rate, options=options)
            self._open_encoder(threads)
        except _FAILURES as error:
            self.abort()
            raise describe_failure(f"the H.264 encoder did not start for {width}x{height}", error) from error
        try:
            self._track = None if sound is None else AacTrack(self._container, sound)
        except _FAILURES as error:
            self.abort()
            raise describe_failure(f"the AAC encoder did not start for {sound}", error) from error
        if live is not None:
            try:
                self._container.start_encoding()  # streams are complete once the header is written
                self._live = LiveMp4(Path(live), self._container.streams)
            except _FAILURES as error:
                self.abort()
                raise describe_failure(f"the live file {live} could not be created", error) from error

    def _open_container(self, sound: SoundFormat | None) -> OutputContainer:
        # In units of a sample the edit list states the track's end exactly; the default unit is a millisecond.
        timescale = {} if sound is None else {"movie_timescale": str(sound.sampling_rate)}
        options = {**_MUXER_OPTIONS, **timescale}
        try:
            return av.open(str(self._output.path), mode="w", format="mp4", container_options=options)
        except _FAILURES as error:
            self._output.discard()
            raise describe_failure(f"{self._output.path} could not be created", error) from error

    def _open_encoder(self, threads: int) -> None:
        context = self._video.codec_context
        context.width, context.height = self._width, self._height
        context.pix_fmt = "yuv420p"
        context.thread_count = threads
        context.thread_type = "FRAME"  # PyAV's default, slices, costs quality
        context.color_range = ColorRange.MPEG
        context.colorspace = _AVCOL_SPC_BT709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.open()

    def write(self, frames: Frames) -> None:
        """Encode the next frames.

        Args:
            frames: uint8 RGB [F, Y, X, 3] of this writer's height and width; F may differ from call to call.

        Raises:
            RequestError: the frames have another dtype or shape; the writer stays usable.
            ClosedError: the writer was closed or has failed.
            MediaError: the encoder or the disk failed; the writer is then closed and its file removed.
        """
        self._require_open()
        check_frames(frames, height=self._height, width=self._width)
        try:
            for pixels in frames:
                self._mux_video(self._video.encode(self._to_yuv(pixels)))
                self.num_frames += 1
        except _FAILURES as error:
            self.abort()
            raise describe_failure(f"encoding stopped at frame {self.num_frames}", error) from error

    def write_sound(self, samples: Samples) -> None:
        """Encode the next samples; they may come before, between or after the frames.

        Args:
            samples: float32 [channels, n], clipped to [-1, 1]; n may differ from call to call. Samples beyond the
                track's ``num_samples`` are dropped.

        Raises:
            RequestError: the samples have another dtype or shape or are not finite, or the writer has no sound track;
                the writer stays usable.
            ClosedError: the writer was closed or has failed.
            MediaError: the encoder or the disk failed; the writer is then closed and its file removed.
        """
        self._require_open()
        if self._track is None or self._counter is None:
            raise sound_error("mp4")
        kept = self._counter.take(samples)
        try:
            self._mux(self._order.add(_SOUND, self._track.encode(kept)))
        except _FAILURES as error:
            self.abort()
            raise describe_failure(f"encoding stopped at sample {self._counter.num_samples} of sound", error) from error

    def _mux_video(self, packets: list[av.Packet[Any]]) -> None:
        self.num_encoded += len(packets)
        self._mux(self._order.add(_VIDEO, packets))

    def _mux(self, packets: list[av.Packet[Any]]) -> None:
        self._container.mux(packets)
        if self._live is not None:
            self._live.mux(packets)

    def _to_yuv(self, pixels: Frames) -> av.VideoFrame:
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_RGB_TO_YUV,
            threads=1,
        )
        frame.pts = self.num_frames
        frame.time_base = self._frame_time_s
        return frame

    def close(self) -> None:
        """Finish the file and give it its name; idempotent.

        Raises:
            MediaError: no frame was written, too few samples came, or the encoder or the disk failed; no file is left.
        """
        if not self._is_open:
            return
        if self.num_frames == 0:
            self.abort()
            raise MediaError("no frame was written, so there is no file; write at least one before close()")
        try:
            if self._counter is not None:
                self._counter.check_complete()
        except MediaError:
            self.abort()
            raise
        try:
            self._flush()
            if self._live is not None:
                self._live.close()
            self._container.close()
        except _FAILURES as error:
            self.abort()
            raise describe_failure(f"the file could not be finished after {self.num_frames} frames", error) from error
        self._is_open = False
        self._output.commit()

    def _flush(self) -> None:
        self._mux_video(self._video.encode(None))
        if self._track is not None:
            self._mux(self._order.add(_SOUND, self._track.flush()))
        self._mux(self._order.flush())

    def abort(self) -> None:
        """Close the encoder and leave no file but the live one. Does nothing after :meth:`close`."""
        if not self._is_open:
            return
        self._is_open = False
        for container in (self._container, self._live):
            # The file is removed next; the live one stays as it is.
            with contextlib.suppress(*_FAILURES):
                if container is not None:
                    container.close()
        self._output.discard()


def _check_settings(*, height: Any, width: Any, crf: Any, preset: Any) -> None:
    for field, value in (("height", height), ("width", width)):
        if not _is_int(value) or value < 2 or value % 2:
            raise RequestError(field, value, "an even number of pixels", "H.264 in yuv420p stores 2 x 2 blocks")
    checks.real("crf", crf, 0, MAX_CRF)
    checks.choice("preset", preset, X264_PRESETS)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
