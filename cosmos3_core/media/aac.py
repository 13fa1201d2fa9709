"""The AAC track of an mp4, and the order of the tracks' packets in a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.container import OutputContainer

from cosmos3_core.errors import RequestError
from cosmos3_core.media.sound import Samples, SoundFormat

AAC_SAMPLING_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
"""The sampling rates (Hz) that AAC can store."""

# 192 kb/s for stereo at 48 kHz, at which AAC-LC is hard to tell from the original; in proportion at other rates.
_BITS_PER_SAMPLE = 2

# FFmpeg's default search, "twoloop", begins with an audible burst; docs/performance.md has the measurement.
_OPTIONS = {"aac_coder": "fast"}

_LAYOUTS = {1: "mono", 2: "stereo"}


def check_aac(sound: SoundFormat) -> None:
    """Make sure that AAC can store a track.

    Raises:
        RequestError: AAC has no such sampling rate.
    """
    if sound.sampling_rate not in AAC_SAMPLING_RATES:
        rates = ", ".join(map(str, AAC_SAMPLING_RATES))
        raise RequestError("sampling_rate", sound.sampling_rate, f"one of {rates}", "write a wav, which takes any rate")


class AacTrack:
    """The AAC-LC track of a container that is open for writing.

    The encoder's delay, one frame of 1024 samples, is stored before time 0; the muxer's edit list makes players skip
    it.

    Args:
        sound: format of the track, checked by :func:`check_aac`; it takes 2 bits per sample.
    """

    def __init__(self, container: OutputContainer, sound: SoundFormat) -> None:
        self._layout = _LAYOUTS[sound.num_channels]
        self._rate = sound.sampling_rate
        self._stream = container.add_stream("aac", rate=self._rate, layout=self._layout, options=_OPTIONS)
        context = self._stream.codec_context
        context.bit_rate = _BITS_PER_SAMPLE * self._rate * sound.num_channels
        context.thread_count = 1
        context.flags |= Flags.bitexact  # otherwise the library's version is stored
        context.open()
        self._num_frame_samples = context.frame_size
        self._waiting: Samples = np.zeros((sound.num_channels, 0), np.float32)
        self._num_encoded = 0

    def encode(self, samples: Samples) -> list[av.Packet[Any]]:
        """Encode the next samples, float32 [channels, n]; an incomplete frame waits for more of them."""
        waiting = np.concatenate([self._waiting, samples], axis=1)
        packets: list[av.Packet[Any]] = []
        while waiting.shape[1] >= self._num_frame_samples:
            packets += self._encode_frame(waiting[:, : self._num_frame_samples])
            waiting = waiting[:, self._num_frame_samples :]
        self._waiting = waiting.copy()  # a view would keep the whole chunk
        return packets

    def flush(self) -> list[av.Packet[Any]]:
        """Return the last packets; no more samples may follow."""
        packets = self._encode_frame(self._waiting) if self._waiting.shape[1] else []
        return packets + list(self._stream.encode(None))

    def _encode_frame(self, samples: Samples) -> list[av.Packet[Any]]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate = self._rate
        frame.pts, frame.time_base = self._num_encoded, Fraction(1, self._rate)
        self._num_encoded += samples.shape[1]
        return list(self._stream.encode(frame))


class PacketInterleaver:
    """Merges the packets of several tracks by decode time, for any order of encoding.

    A packet is held until every track has one waiting, which decides the earliest. The order in the file is thus
    deterministic, at the price of holding the packets of a track that is ahead. Of two packets with the same time, the
    track with the lower number comes first.

    Args:
        num_tracks: number of tracks; with one, packets pass at once.
    """

    def __init__(self, num_tracks: int) -> None:
        self._tracks: list[deque[av.Packet[Any]]] = [deque() for _ in range(num_tracks)]

    def add(self, track: int, packets: Iterable[av.Packet[Any]]) -> list[av.Packet[Any]]:
        """Take the next packets of a track; return those that may go into the file now."""
        self._tracks[track].extend(packets)
        ready = []
        while all(self._tracks):
            ready.append(min(self._tracks, key=_decode_time_s).popleft())
        return ready

    def flush(self) -> list[av.Packet[Any]]:
        """Return all held packets in order; no more packets may follow."""
        ready = []
        while waiting := [track for track in self._tracks if track]:
            ready.append(min(waiting, key=_decode_time_s).popleft())
        return ready


def _decode_time_s(track: deque[av.Packet[Any]]) -> Fraction:
    """Return the decode time of a track's next packet, exact; both encoders stamp every packet."""
    packet = track[0]
    assert packet.dts is not None
    return packet.dts * Fraction(packet.time_base)
