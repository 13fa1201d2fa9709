"""What :meth:`Engine.step` gives -> frames and sound -> a file. The names match PhyAI's documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos3_core.errors import RequestError
from cosmos3_core.media.mp4 import Mp4Writer, exact_frame_rate
from cosmos3_core.media.pixels import Frames, unit_to_uint8
from cosmos3_core.media.sound import Samples, SoundFormat, WavWriter
from cosmos3_core.shapes import sound_samples

if TYPE_CHECKING:
    from torch import Tensor

# One latent of the sound tokenizer at 48 kHz: a waveform of whole latents may miss the video's end by less than that.
_MAX_PADDED_SAMPLES = 1920


@dataclass(frozen=True)
class GeneratedMedia:
    """One generation's media on the CPU.

    Attributes:
        frames: uint8 RGB [F, Y, X, 3].
        sound: the waveform as generated, float32 [channels, samples] in about [-1, 1]; None for a silent clip.
        sampling_rate: the sound's samples per second (Hz); None without sound.
    """

    frames: Frames
    sound: Samples | None = None
    sampling_rate: int | None = None


class Cosmos3GenerationPostProcessor:
    """Turns an engine's pixels, and sound, into files.

    Args:
        fps: frames per second of the clip.
    """

    def __init__(self, fps: float = 24.0) -> None:
        self.fps = fps

    def postprocess(self, output: Tensor | Mapping[str, Any]) -> GeneratedMedia:
        """What the engine gave -> frames, and sound, on the CPU.

        Args:
            output: pixels (1, 3, F, Y, X) in [0, 1], or with sound the mapping ``{"video": those pixels, "sound":
                floating point [channels, samples], "sample_rate": int}``.

        Raises:
            RequestError: another shape or dtype, or a mapping without these keys.
        """
        if not isinstance(output, Mapping):
            return GeneratedMedia(unit_to_uint8(output).cpu().numpy())
        missing = {"video", "sound", "sample_rate"} - set(output)
        if missing:
            hint = f"missing: {', '.join(sorted(missing))}"
            raise RequestError("output", sorted(output), "a mapping with video, sound and sample_rate", hint)
        sound = output["sound"]
        if sound.ndim != 2 or not sound.is_floating_point():
            given = f"{sound.dtype} {list(sound.shape)}"
            raise RequestError("sound", given, "a floating point tensor [channels, samples]")
        frames = unit_to_uint8(output["video"]).cpu().numpy()
        return GeneratedMedia(frames, sound.detach().float().cpu().numpy(), int(output["sample_rate"]))

    def save_mp4(self, media: GeneratedMedia, path: str | Path) -> Path:
        """Write the frames as an H.264 mp4, with their sound as AAC if there is any, and return its path.

        The sound ends with the video: what is longer is cut. What is shorter by up to one latent of the sound
        tokenizer (1920 samples, 40 ms at 48 kHz) ends in silence; what is shorter still is not this video's sound.

        Raises:
            RequestError: the path is not in an existing directory, or the sound is too short.
            MediaError: the file could not be written.
        """
        _, height, width, _ = media.frames.shape
        samples, sound = self._track(media) if media.sound is not None else (None, None)
        with Mp4Writer(path, fps=self.fps, height=height, width=width, sound=sound) as writer:
            writer.write(media.frames)
            if samples is not None:
                writer.write_sound(samples)
        return Path(path)

    def save_wav(self, media: GeneratedMedia, path: str | Path) -> Path:
        """Write the sound alone, 16-bit PCM, the very samples that :meth:`save_mp4` encodes, and return its path.

        Raises:
            RequestError: there is no sound, it is too short, or the path is not in an existing directory.
            MediaError: the file could not be written.
        """
        samples, sound = self._track(media)
        with WavWriter(path, sound) as writer:
            writer.write_sound(samples)
        return Path(path)

    def _track(self, media: GeneratedMedia) -> tuple[Samples, SoundFormat]:
        """The samples up to the video's end, padded with silence where a little is missing, and their format."""
        if media.sound is None or media.sampling_rate is None:
            raise RequestError("media.sound", None, "a waveform with its sampling_rate", "this clip was made silent")
        num_channels, num_given = media.sound.shape
        num_samples = sound_samples(len(media.frames), exact_frame_rate(self.fps), media.sampling_rate)
        num_missing = max(num_samples - num_given, 0)
        if num_missing > _MAX_PADDED_SAMPLES:
            allowed = f"at least {num_samples - _MAX_PADDED_SAMPLES} samples for {len(media.frames)} frames"
            raise RequestError("media.sound", f"{num_given} samples", allowed, "check fps and sampling_rate")
        samples = np.pad(media.sound[:, :num_samples], ((0, 0), (0, num_missing)))
        return samples, SoundFormat(media.sampling_rate, num_channels, num_samples)
