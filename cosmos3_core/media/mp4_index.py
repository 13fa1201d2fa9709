"""Bounds the memory that FFmpeg allocates for an MP4's tables, before it opens the file. No torch here.

A table can state "20 million samples of one byte each" in 20 bytes, and FFmpeg indexes all of them (60 bytes a sample)
when it opens the file. Boxes: ISO/IEC 14496-12; how FFmpeg expands them: libavformat/mov.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cosmos3_core.presets import LIMITS

_NESTED = {b"moov", b"trak", b"mdia"}
_MAX_DEPTH = 3

# Box -> offset of its number of entries, in bytes after its name. FFmpeg finds these boxes at any depth.
_COUNTS_AT = {b"stsz": 8, b"stz2": 8, b"trun": 4, b"stts": 4, b"ctts": 4, b"elst": 4}
_TABLES = re.compile(b"|".join([*_COUNTS_AT, b"cmov"]))

# Every edit repeats its index entries; editors write one or two.
_MAX_EDITS = 64
# Frames that edits cut away are in the tables, too.
_MAX_SAMPLES = 2 * LIMITS.max_clip_frames


class TooManySamples(Exception):
    """A table has more frames than the limit; ``args[0]`` is their number."""


class NoVideoTrack(Exception):
    """The file has tracks, none of them of video."""


def blank_other_tracks(data: bytes) -> bytes:
    """Blank all tracks but video, so that FFmpeg ignores them; the other bytes stay in place.

    Raises:
        TooManySamples: the remaining tables have too many frames.
        NoVideoTrack: there are tracks, but none of video.
        ValueError: the tables are of an unsupported kind.
    """
    file = bytearray(data)
    handlers = [(start, end, _handler(data, start, end)) for name, start, end in _boxes(data) if name == b"trak"]
    if handlers and all(handler != b"vide" for _, _, handler in handlers):
        raise NoVideoTrack
    for start, end, handler in handlers:
        if handler != b"vide":
            file[start - 4 : end] = b"free" + bytes(end - start)
    _check_tables(bytes(file))
    return bytes(file)


def _boxes(data: bytes, start: int = 0, end: int | None = None, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of the content, end) of every box, also of those inside ``_NESTED``."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        num_bytes, name, content = (
            int.from_bytes(data[start : start + 4], "big"),
            data[start + 4 : start + 8],
            start + 8,
        )
        if num_bytes == 1:
            num_bytes, content = int.from_bytes(data[start + 8 : start + 16], "big"), start + 16
        stop = end if num_bytes == 0 else start + num_bytes
        if not content <= stop <= end:
            return
        yield name, content, stop
        if name in _NESTED and depth < _MAX_DEPTH:
            yield from _boxes(data, content, stop, depth + 1)
        start = stop


def _handler(data: bytes, start: int, end: int) -> bytes:
    """Return the kind of a track: "vide", "soun" and so on."""
    for name, content, _ in _boxes(data, start, end, depth=1):
        if name == b"hdlr":
            return data[content + 8 : content + 12]
    return b""


def _check_tables(data: bytes) -> None:
    # By name, not by place: FFmpeg may read a crafted file's nesting differently. Compressed frames contain the names
    # by chance, but rarely after a number that could be the box's length.
    for match in _TABLES.finditer(data):
        name, at = match.group(), match.start()
        num_bytes = int.from_bytes(data[at - 4 : at], "big")
        if num_bytes != 1 and not 12 <= num_bytes <= len(data) - at + 4:
            continue
        content = at + 4 + (8 if num_bytes == 1 else 0)
        if name == b"cmov":
            raise ValueError("a compressed header")
        position = content + _COUNTS_AT[name]
        count = int.from_bytes(data[position : position + 4], "big")
        if name in (b"stts", b"ctts") and count <= _MAX_SAMPLES:
            runs = range(position + 4, min(position + 4 + 8 * count, len(data)), 8)
            count = sum(int.from_bytes(data[run : run + 4], "big") for run in runs)
        if name == b"elst" and count > _MAX_EDITS:
            raise ValueError(f"{count} edits")
        if count > _MAX_SAMPLES:
            raise TooManySamples(count)
