"""Copies the sound of an mp4 into an m4a, packet by packet, undecoded. No torch here."""

from __future__ import annotations

import contextlib
from typing import BinaryIO

import av

from cosmos3_core.errors import Cosmos3Error, MediaError
from cosmos3_core.media.output import OutputFile, Target

# As in our mp4: the index first, no dates and library versions.
_OPTIONS = {"movflags": "faststart", "fflags": "+bitexact"}


class NoSoundTrack(Cosmos3Error):
    """The file has no sound track."""


def write_sound_track(target: Target, source: BinaryIO) -> None:
    """Copy the sound of an mp4 of this package into an m4a, packet by packet, with its edit list.

    Args:
        source: the mp4, seekable.

    Raises:
        NoSoundTrack: the mp4 has no sound.
        RequestError: the target is unusable.
        MediaError: the source is damaged, or the m4a could not be written; no file is left.
        OSError: the source cannot be read.
    """
    source.seek(0)
    with contextlib.ExitStack() as opened:
        try:
            container = opened.enter_context(av.open(source, mode="r", format="mp4"))
        except av.FFmpegError as error:
            raise MediaError(f"not an mp4 that can be read: {error}") from error
        if not len(container.streams):
            raise MediaError("not an mp4 that can be read: there is nothing in it")
        if not container.streams.audio:
            raise NoSoundTrack("there is no sound in this file")
        stream = container.streams.audio[0]
        output = OutputFile(target)
        try:
            # In units of a sample the edit list states the track's end exactly; the default unit is a millisecond.
            options = {**_OPTIONS, "movie_timescale": str(stream.codec_context.sample_rate)}
            with av.open(str(output.path), mode="w", format="ipod", container_options=options) as written:
                copy = written.add_stream_from_template(stream)
                for packet in container.demux(stream):
                    if packet.dts is not None:  # the last one only marks the end
                        packet.stream = copy
                        written.mux(packet)
        except BaseException as error:
            output.discard()
            if isinstance(error, av.FFmpegError):
                raise MediaError(f"the sound track could not be copied: {error}") from error
            raise
        output.commit()
