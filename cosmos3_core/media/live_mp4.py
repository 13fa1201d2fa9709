"""A fragmented mp4 that can be watched while it grows: a second copy of the packets of an mp4 in the making.

It begins with ftyp and a moov without samples; then a moof and an mdat follow for every 80 ms, appended whole and never
changed: a reader can play the file as it grows. Edit lists, one per track, keep sound and pictures in step: they put
time 0 after the AAC encoder's delay, and after the frames that B-frames make the decoder read ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av

# "delay_moov": edit lists are known with the first packets only. Composition offsets stay positive: with negative ones
# FFmpeg's reader (also Chromium's) delays the pictures against the sound by two frames, the B-frame delay. A fragment
# for every frame would arrive one frame earlier, but FFmpeg 8 then gives two consecutive AAC frames the same time.
# "flush_packets": a written fragment is in the file, not in a buffer of 256 KiB.
_OPTIONS = {
    "movflags": "delay_moov+default_base_moof+skip_trailer",
    "frag_duration": "80000",  # microseconds, 2 frames at 24 fps; 2.3% of a clip of 192 x 320 with sound
    "fflags": "+bitexact",
    "flush_packets": "1",
}


class LiveMp4:
    """The growing file. Not thread-safe; the methods raise what the constructor does.

    Args:
        path: path of the file, in an existing directory; the file is created at once and never removed here.
        streams: streams of the container that the packets are encoded for, after its header is written; packets have
            their indices and time bases.

    Raises:
        av.FFmpegError, OSError: the file cannot be written.
    """

    def __init__(self, path: Path, streams: Iterable[Any]) -> None:
        # Absolute, because FFmpeg would read "a:b.mp4" as a URL of protocol "a".
        self._container = av.open(str(path.absolute()), mode="w", format="mp4", container_options=_OPTIONS)
        for stream in streams:
            self._container.add_stream_from_template(stream)
        self._container.start_encoding()

    def mux(self, packets: Sequence[av.Packet[Any]]) -> None:
        """Add packets after the other container has them, in its order."""
        self._container.mux(packets)

    def close(self) -> None:
        """Write the last fragment; idempotent."""
        self._container.close()
