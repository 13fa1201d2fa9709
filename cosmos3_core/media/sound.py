"""Sound for a file: the format of a track, checks of its samples, and the wav writer.

Samples are float32 [channels, n] in [-1, 1]; a channel is a row. Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import wave
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.output import MediaWriter, OutputFile, Target
from cosmos3_core.media.pixels import Frames

Samples: TypeAlias = npt.NDArray[np.float32]
"""Sound, float32 [channels, n] in [-1, 1]."""

MAX_CHANNELS = 2
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1_000, 384_000
# Two channels of 16 bits stay below the 4 GiB that a wav's header can state.
MAX_SAMPLES = 10**9

_PCM16_STEPS = 32768


@dataclass(frozen=True)
class SoundFormat:
    """The format of a sound track.

    Attributes:
        sampling_rate: samples per second and channel (Hz).
        num_channels: 1 (mono) or 2 (left, right).
        num_samples: samples per channel in the file, exactly.

    Raises:
        RequestError: a value is out of range.
    """

    sampling_rate: int
    num_channels: int
    num_samples: int

    def __post_init__(self) -> None:
        checks.integer("sampling_rate", self.sampling_rate, MIN_SAMPLING_RATE, MAX_SAMPLING_RATE)
        checks.integer("num_channels", self.num_channels, 1, MAX_CHANNELS)
        checks.integer("num_samples", self.num_samples, 1, MAX_SAMPLES)


def check_samples(samples: Any, num_channels: int | None = None) -> None:
    """Make sure that ``samples`` is a float32 array [channels, n] of finite numbers, of ``num_channels`` if given.

    Raises:
        RequestError: it is not; the message has both shapes.
    """
    allowed = f"a float32 array [{'channels' if num_channels is None else num_channels}, n]"
    if not isinstance(samples, np.ndarray):
        raise RequestError(
            "samples", type(samples).__name__, allowed, "convert a tensor with sound.float().cpu().numpy()"
        )
    if samples.dtype != np.float32 or samples.ndim != 2 or num_channels not in (None, len(samples)):
        raise RequestError("samples", f"{samples.dtype} {list(samples.shape)}", allowed)
    if not np.isfinite(samples).all():
        raise RequestError("samples", "NaN or infinity among them", "finite numbers, -1 to 1")


class SampleCounter:
    """Passes exactly as many samples as a track holds, and reports too few."""

    def __init__(self, sound: SoundFormat) -> None:
        self._sound = sound
        self.num_samples = 0

    def take(self, samples: Samples) -> Samples:
        """Return the samples that still belong to the track, clipped to [-1, 1]; float32 [channels, n].

        Raises:
            RequestError: the samples have another dtype or shape, or are not finite; none is counted.
        """
        check_samples(samples, self._sound.num_channels)
        kept = samples[:, : self._sound.num_samples - self.num_samples]
        self.num_samples += kept.shape[1]
        # A waveform decoder overshoots a little; every encoder would clip, or wrap around.
        return np.clip(kept, -1, 1)

    def check_complete(self) -> None:
        """Make sure that all samples came.

        Raises:
            MediaError: samples are missing.
        """
        if self.num_samples < self._sound.num_samples:
            expected = self._sound.num_samples
            raise MediaError(f"only {self.num_samples} of the {expected} samples of sound came before close()")


def sound_error(kind: str) -> RequestError:
    """Return the error of a writer whose file has no sound track."""
    hint = "sound goes into a wav, or an mp4 opened with a SoundFormat"
    return RequestError("samples", "sound", f"left out of this {kind}", hint)


def to_pcm16(samples: Samples) -> npt.NDArray[np.int16]:
    """Convert samples, float32 [channels, n] -> int16 [channels, n]: times 32768, rounded, halves to even, clipped.

    Readers divide by 32768, which restores values within half a step; only 1.0, which has no int16, becomes
    32767/32768.
    """
    scaled = np.rint(samples.astype(np.float64) * _PCM16_STEPS)
    return np.clip(scaled, -_PCM16_STEPS, _PCM16_STEPS - 1).astype(np.int16)


class WavWriter(MediaWriter):
    """Writes sound as a 16-bit PCM wav; see :func:`to_pcm16` for the rounding.

    Chunks are written as they come; the cuts between them do not change the file. The file appears when :meth:`close`
    returns. An exception in the ``with`` block, or a failure in :meth:`write_sound`, leaves no file.

    Raises:
        RequestError: the path is unusable.
        MediaError: the file could not be opened.
    """

    def __init__(self, target: Target, sound: SoundFormat) -> None:
        self._counter = SampleCounter(sound)
        self._output = OutputFile(target)
        try:
            self._wave = wave.open(str(self._output.path), "wb")  # noqa: SIM115 - close() and abort() close it
        except OSError as error:
            self._output.discard()
            raise MediaError(f"{self._output.path} could not be created: {error}") from error
        self._wave.setparams((sound.num_channels, 2, sound.sampling_rate, sound.num_samples, "NONE", "not compressed"))

    def write(self, frames: Frames) -> None:
        """Raise RequestError: a wav takes no frames."""
        raise RequestError("frames", "frames", "left out of a wav", "open an mp4 for pictures with sound")

    def write_sound(self, samples: Samples) -> None:
        """Write the next samples, float32 [channels, n] in [-1, 1]; samples beyond the track's end are dropped.

        Raises:
            RequestError: the samples have another dtype or shape, or are not finite; the writer stays usable.
            ClosedError: the writer was closed or has failed.
            MediaError: the disk failed; the writer is then closed and its file removed.
        """
        self._require_open()
        kept = self._counter.take(samples)
        try:
            self._wave.writeframesraw(to_pcm16(kept).T.tobytes())
        except OSError as error:
            self.abort()
            raise MediaError(f"writing stopped at sample {self._counter.num_samples}: {error}") from error

    def close(self) -> None:
        """Finish the file and give it its name; idempotent.

        Raises:
            MediaError: too few samples came, or the disk failed; no file is left.
        """
        if not self._is_open:
            return
        try:
            self._counter.check_complete()
            self._wave.close()
        except (MediaError, OSError) as error:
            self.abort()
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"the wav could not be finished: {error}") from error
        self._is_open = False
        self._output.commit()

    def abort(self) -> None:
        """Close the writer and leave no file. Does nothing after :meth:`close`."""
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # the file is removed next
            self._wave.close()
        self._output.discard()
