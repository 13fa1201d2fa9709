"""A fragmented mp4 that can be watched while it is made: the packets of an mp4 in the making, a second time.

First ftyp and a moov without samples, then a moof and an mdat for every 80 ms, appended whole and never touched again:
whoever reads the file as it grows can play what is there. It plays in step by its edit lists, one a track, which say
where time 0 is: behind the AAC encoder's delay, and behind the frames that B-frames have decoded ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av

# "delay_moov": edit lists are known with the first packets only. Composition offsets stay positive: with negative ones
# FFmpeg's reader, Chromium's too, has pictures late by the B-frame delay, two frames, and sound not. A fragment for
# every frame would come a frame earlier, but there FFmpeg 8 gives two AAC frames in a row the same time.
# "flush_packets": a fragment is in the file, not in a buffer of 256 KiB, when it has been written.
_OPTIONS = {
    "movflags": "delay_moov+default_base_moof+skip_trailer",
    "frag_duration": "80000",  # microseconds, 2 frames at 24 fps; 2.3% of a clip of 192 x 320 with sound
    "fflags": "+bitexact",
    "flush_packets": "1",
}


class LiveMp4:
    """The growing file. Not thread-safe.

    Args:
        path: of the file, in an existing directory; it is there from now on, and stays whatever becomes of it.
        streams: of the container that the packets are encoded for, whose header was written; packets have their indices
            and time bases.

    Raises:
        av.FFmpegError, OSError: it cannot be written.
    """

    def __init__(self, path: Path, streams: Iterable[Any]) -> None:
        # Absolute, because FFmpeg would read "a:b.mp4" as a URL of protocol "a".
        self._container = av.open(str(path.absolute()), mode="w", format="mp4", container_options=_OPTIONS)
        for stream in streams:
            self._container.add_stream_from_template(stream)
        self._container.start_encoding()

    def mux(self, packets: Sequence[av.Packet[Any]]) -> None:
        """Add packets, in the order of the other container and after they went into it.

        Raises:
            av.FFmpegError, OSError: they cannot be written.
        """
        self._container.mux(packets)

    def close(self) -> None:
        """Write what waits as the last fragment. Does nothing the second time.

        Raises:
            av.FFmpegError, OSError: it cannot be written.
        """
        self._container.close()
