"""`bench encode`: measures the mp4 writer on synthetic frames, beside PyAV's x264 with its defaults. No torch here.

The reference has the same x264 preset, quality and threads; everything else is PyAV's default: the conversion to
yuv420p, x264's own parameters, the index after the frames.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from cosmos3_core.bench.peak import peak_growth_bytes
from cosmos3_core.bench.report import Row, frames_per_second
from cosmos3_core.bench.stopwatch import Stopwatch
from cosmos3_core.media.mp4 import Mp4Writer, encoder_threads
from cosmos3_core.media.pixels import Frames

REFERENCE = "PyAV's x264"
PEAK_NOTE = "Peak memory is the resident memory that encoding adds to the frames, in a process of its own."
DELAY_NOTE = "First packet: frames written until x264 returns the first packet; none if it waits for the clip's end."

_FRAMES_PER_CHUNK = 4  # as from the decoder
_FPS = 24


@dataclass(frozen=True)
class Settings:
    """Settings of an encoder: ``crf``, ``preset``, ``threads`` and ``lossless`` of :class:`Mp4Writer`."""

    crf: float = 18
    preset: str = "medium"
    threads: int | None = None
    lossless: bool = False


@dataclass(frozen=True)
class Footage:
    """Synthetic frames of a shape in pixels."""

    num_frames: int
    height: int
    width: int

    def chunks(self) -> Iterator[Frames]:
        """Yield the frames, uint8 [F, Y, X, 3], up to four at a time: moving waves under a grain that does not repeat.

        Every call yields the same frames, made one by one with little memory.
        """
        noise = np.random.default_rng(0).integers(0, 16, (2 * self.height, 2 * self.width, 3), np.uint8)
        rows_Y, columns_X = np.arange(self.height), np.arange(self.width)
        for start in range(0, self.num_frames, _FRAMES_PER_CHUNK):
            stop = min(start + _FRAMES_PER_CHUNK, self.num_frames)
            chunk = np.empty((stop - start, self.height, self.width, 3), np.uint8)
            for frame, pixels in enumerate(chunk, start):
                y, x = (37 * frame) % self.height, (101 * frame) % self.width
                pixels[:] = noise[y : y + self.height, x : x + self.width]
                for channel in range(3):
                    pixels[:, :, channel] += _wave(rows_Y, 90, 3 * frame + 40 * channel)[:, None]
                    pixels[:, :, channel] += _wave(columns_X, 140, -2 * frame + 70 * channel)[None]
            yield chunk


def _wave(positions: npt.NDArray[np.int64], period: int, shift: int) -> Frames:
    return np.round(60 + 55 * np.sin((positions + shift) * (2 * np.pi / period))).astype(np.uint8)


@dataclass(frozen=True)
class Encoded:
    """One encoded clip: bytes of its file, and frames written at its first packet; None if that came at the end."""

    num_bytes: int
    delay_frames: int | None

    @property
    def delays(self) -> list[float]:
        """The delay as the values of a row."""
        return [] if self.delay_frames is None else [float(self.delay_frames)]


Write = Callable[[Path, Footage, Iterable[Frames], Settings], Encoded]


def measure_encode(footage: Footage, settings: Settings, *, runs: int) -> list[Row]:
    """Measure speed, delay, memory and file size, ours and PyAV's in turns, so that a slow machine slows both.

    Args:
        footage: the clip to encode; all its frames are in memory.

    Raises:
        RequestError: the writer refuses a setting.
        MeasureError: the memory could not be measured.
    """
    name = "lossless" if settings.lossless else f"H.264, crf {settings.crf:g}"
    watch, whole = Stopwatch(), f"{name}: whole clip"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.mp4"
        chunks = list(footage.chunks())
        for run in range(-1, runs):
            watch.time_ours(whole, run, write_ours, path, footage, chunks, settings)
            watch.time_theirs(whole, run, write_theirs, path, footage, chunks, settings)
        writes = (write_ours, write_theirs)
        ours, theirs = (write(path, footage, chunks, settings) for write in writes)
        del chunks
        peaks = [peak_growth_bytes(prepare_encode, write, path, footage, settings) / 1e6 for write in writes]
    return [
        *watch.rows,
        frames_per_second(watch.row(whole), footage.num_frames),
        Row(f"{name}: first packet", "frames", ours.delays, theirs.delays),
        Row(f"{name}: peak memory", "MB", peaks[:1], peaks[1:]),
        Row(f"{name}: file", "bytes", [float(ours.num_bytes)], [float(theirs.num_bytes)]),
    ]


def write_ours(path: Path, footage: Footage, chunks: Iterable[Frames], settings: Settings) -> Encoded:
    """Write the clip as served, with its live file.

    Raises:
        RequestError: the writer refuses a setting.
    """
    delay_frames: int | None = None
    live, height, width = path.with_suffix(".live.mp4"), footage.height, footage.width
    with Mp4Writer(path, fps=_FPS, height=height, width=width, live=live, **vars(settings)) as writer:
        for pixels in chain.from_iterable(chunks):
            writer.write(pixels[None])
            if delay_frames is None and writer.num_encoded:
                delay_frames = writer.num_frames
    return Encoded(path.stat().st_size, delay_frames)


def write_theirs(path: Path, footage: Footage, chunks: Iterable[Frames], settings: Settings) -> Encoded:
    """Write the clip as in PyAV's examples."""
    delay_frames: int | None = None
    quality = {"qp": "0"} if settings.lossless else {"crf": f"{settings.crf:g}"}
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"preset": settings.preset, **quality})
        stream.height, stream.width, stream.pix_fmt = footage.height, footage.width, "yuv420p"
        stream.codec_context.thread_count = settings.threads or encoder_threads(footage.height, footage.width)
        for count, pixels in enumerate(chain.from_iterable(chunks), 1):
            packets = stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
            container.mux(packets)
            if delay_frames is None and packets:
                delay_frames = count
        container.mux(stream.encode())
    return Encoded(path.stat().st_size, delay_frames)


def prepare_encode(write: Write, path: Path, footage: Footage, settings: Settings) -> Callable[[], object]:
    """Return one side's encode with frames made chunk by chunk, for :mod:`cosmos3_core.bench.peak`."""
    for _ in footage.chunks():
        pass  # so that its memory is allocated before the measurement
    return partial(write, path, footage, footage.chunks(), settings)
