"""The kind of a file by its first bytes, and the refusal of unreadable files. No torch here.

A file's name is ignored: Pillow and FFmpeg get only files of the kinds listed here, each with the one reader of that
kind. Playlists and scripts (HLS, DASH, concat, SVG, EPS), whose readers open other files or run programs, are
in no list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from cosmos3_core.errors import RequestError

STILL, CLIP, AUDIO, OTHER = "image", "clip", "audio", "other"

IMAGE_KINDS_TEXT = "a PNG, JPEG, WebP, GIF, BMP or TIFF file"
CLIP_KINDS_TEXT = "an MP4, MOV, WebM, MKV, AVI or MPEG-TS file, or an animated GIF, WebP or PNG"

_MAX_REASON_CHARS = 160


@dataclass(frozen=True)
class FileKind:
    """The kind of a file.

    Attributes:
        name: name in messages, such as ``"PNG"``.
        category: :data:`STILL` (Pillow reads it), :data:`CLIP` (FFmpeg reads it), :data:`AUDIO` or :data:`OTHER`.
        demuxer: FFmpeg's name of the one demuxer for it; "" unless it is a clip.
    """

    name: str
    category: str
    demuxer: str = ""


_BY_PREFIX = (
    (b"\x89PNG\r\n\x1a\n", FileKind("PNG", STILL)),
    (b"\xff\xd8\xff", FileKind("JPEG", STILL)),
    (b"GIF87a", FileKind("GIF", STILL)),
    (b"GIF89a", FileKind("GIF", STILL)),
    (b"BM", FileKind("BMP", STILL)),
    (b"II*\0", FileKind("TIFF", STILL)),
    (b"MM\0*", FileKind("TIFF", STILL)),
    (b"\x1aE\xdf\xa3", FileKind("Matroska or WebM", CLIP, "matroska")),
    (b"ID3", FileKind("MP3", AUDIO)),
    (b"fLaC", FileKind("FLAC", AUDIO)),
    (b"OggS", FileKind("Ogg", OTHER)),
)
_RIFF = {
    b"WEBP": FileKind("WebP", STILL),
    b"AVI ": FileKind("AVI", CLIP, "avi"),
    b"WAVE": FileKind("WAV", AUDIO),
}
_MP4 = FileKind("MP4 or MOV", CLIP, "mov")
_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"}
_HEIF_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
_UNKNOWN = FileKind("unknown", OTHER)


def kind_of(data: bytes) -> FileKind:
    """Find the kind of a file by its first bytes; decodes nothing."""
    for prefix, kind in _BY_PREFIX:
        if data.startswith(prefix):
            return kind
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], _UNKNOWN)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return FileKind("HEIC or AVIF", OTHER)
    if data[4:8] in _MP4_BOXES:
        return _MP4
    if data[:1] == b"G" and data[188:189] == b"G":  # each transport packet of 188 bytes starts with it
        return FileKind("MPEG-TS", CLIP, "mpegts")
    if data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xE0 == 0xE0:
        return FileKind("MP3", AUDIO)
    return _UNKNOWN


@contextlib.contextmanager
def refuse_failures(field: str, given: str, allowed: str) -> Iterator[None]:
    """Turn any error of a reader inside the ``with`` block into a refusal of the file.

    Raises:
        RequestError: something was raised; a RequestError from inside passes unchanged.
    """
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # crafted files make the readers raise errors of any type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_CHARS]
        raise RequestError(field, given, allowed, f"damaged, or not what it says it is ({reason})") from error


def damage_error(field: str, name: str, reason: str) -> RequestError:
    """Return the error for a file of kind ``name`` that is damaged; ``reason`` completes "damaged: ..."."""
    return RequestError(field, with_article(f"{name} file"), "a whole file", f"damaged: {reason}")


def with_article(noun: str) -> str:
    """Return the noun with its article, as spoken: "a PNG file", "an MP4 file"."""
    spoken_with_vowel = noun[:1] in "AEIOaeio" or noun.split()[0] in ("MP4", "MP3", "MPEG-TS")
    return f"{'an' if spoken_with_vowel else 'a'} {noun}"
