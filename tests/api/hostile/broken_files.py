"""Damaged files, and files that make a careless reader open others."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import PIL.Image

from tests.api.hostile.broken_bodies import JSON, MULTIPART, form, part
from tests.mode_inputs import CLIP, IMAGE, data_url, mp4


def stills() -> dict[str, bytes]:
    """Name -> a small picture of each kind."""
    return {kind: _picture(kind) for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")}


def clips() -> dict[str, bytes]:
    """Name -> a small clip of each kind, animations among them."""
    return {
        "mp4": mp4(),
        "mkv": _clip("matroska", "mpeg4"),
        "avi": _clip("avi", "mpeg4"),
        "ts": _clip("mpegts", "mpeg2video"),
        "animated gif": _picture("gif", is_animated=True),
        "animated webp": _picture("webp", is_animated=True),
        "animated png": _picture("png", is_animated=True),
    }


def non_pictures() -> dict[str, bytes]:
    """Name -> a file that is not a picture."""
    return {"wav": _wav(), "zip": _zip(b"a"), "text": b"a red car", "nothing": b"", "pdf": b"%PDF-1.7\n%%EOF"}


def bombs(scale: int) -> dict[str, bytes]:
    """Name -> a file that claims to be large, or has very many parts.

    Args:
        scale: 10 in the long tier.
    """
    unfolded_bytes = 2_000_100 * scale
    png, huge = _picture("png"), (2**31 - 1).to_bytes(4, "big")
    gif = bytearray(_picture("gif"))
    gif[6:10] = b"\xff\xff\xff\xff"
    webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff" * 6
    zeros = zlib.compress(bytes(unfolded_bytes), 9)
    tall = struct.pack(">IIBBBBB", 2000 * scale, 1000, 8, 0, 0, 0, 0)
    text = _chunk(b"zTXt", b"a\0\0" + zeros)
    return {
        "a png of a huge size": png[:16] + huge + huge + png[24:],
        "a png that unfolds": png[:8] + _chunk(b"IHDR", tall) + _chunk(b"IDAT", zeros) + _chunk(b"IEND", b""),
        "a png with a text that unfolds": png[:33] + text + png[33:],
        "a png of chunks": png[:33] + _chunk(b"tEXt", b"a\0b") * 2000 * scale + png[33:],
        "a gif of a huge size": bytes(gif),
        "a gif of frames": bytes(gif[:13]) + b"\x2c\0\0\0\0\1\0\1\0\0\2\1\0\0" * 5000 * scale + b"\x3b",
        "a webp of a huge size": webp,
        "a bmp of a huge size": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "a tiff that leads to itself": b"II*\0" + struct.pack("<IHI", 8, 0, 8),
        "an mp4 of boxes": _box(b"ftyp", b"isommp42") + _box(b"free", b"") * 20_000 * scale,
        "an mp4 of boxes in boxes": b"".join(
            struct.pack(">I4s", 8 * size, b"moov" if size % 2 else b"trak") for size in range(2000 * scale, 0, -1)
        ),
        "an mp4 with a huge box": struct.pack(">I4s", 16, b"ftyp")
        + b"isommp42"
        + struct.pack(">I4sQ", 1, b"moov", 2**63),
        "a zip that unfolds": _zip(bytes(unfolded_bytes)),
    }


@dataclass(frozen=True)
class Lures:
    """A file and a port that a careless reader would access.

    Attributes:
        path: of a file that must not be read.
        address: host and port that must not be called.
    """

    path: str
    address: str

    def texts(self) -> Iterator[str]:
        """Texts that refer to them, sent in place of a file."""
        path, address = self.path, self.address
        yield from (path, f"file://{path}", f"file:{path}", f"FILE://{path}", f"file://localhost{path}", f"./..{path}")
        yield from (
            f"http://{address}/a.png",
            f"https://{address}/a.png",
            f"//{address}/a.png",
            f"ftp://{address}/a.png",
        )
        yield from (f"gopher://{address}/_a", f"tcp://{address}", f"rtmp://{address}/a", f"\\\\{address}\\share\\a.png")
        yield from (
            f"concat:{path}|{path}",
            f"subfile,,start,0,end,9,,:{path}",
            f"cache:http://{address}/",
            f"data:{path}",
        )
        yield from (
            f"data:text/uri-list,http://{address}/",
            f"data:image/png;base64,{path}",
            f"data:;base64,file://{path}",
        )
        yield from (
            f"pipe:{path}",
            f"async:{path}",
            f"image2:{path}",
            f"http://{address}@example.com/",
            f" http://{address}/a",
        )
        yield from (f"jar:file://{path}!/a", f"php://filter/resource={path}", f"url:{path}", f"@{path}", f"|cat {path}")
        yield "data:image/svg+xml;base64," + base64.b64encode(self._svg()).decode()

    def files(self) -> dict[str, bytes]:
        """Name -> a file that refers to them."""
        path, url, local = self.path, f"http://{self.address}/a.ts", f"file://{self.path}"
        playlist, jpeg, port = self._playlist(), _picture("jpeg"), self.address.rpartition(":")[2]
        return {
            "svg": self._svg(),
            "xml": f'<!DOCTYPE a [<!ENTITY b SYSTEM "{local}"><!ENTITY % c SYSTEM "{url}">%c;]><a>&b;</a>'.encode(),
            "pdf": f"%PDF-1.7\n1 0 obj<</Type/Action/S/URI/URI({url})/F({path})>>endobj\n%%EOF".encode(),
            "postscript": f"%!PS\n({path}) (r) file 100 string readstring pop print\n(%pipe%cat {path}) run".encode(),
            "mvg": f"push graphic-context\nimage over 0,0 0,0 'url({url})'\nimage over 0,0 0,0 'msl:{path}'\n".encode(),
            "html": f'<img src="{url}"><iframe src="{local}"></iframe>'.encode(),
            "ffconcat": f"ffconcat version 1.0\nfile {path}\nfile '{url}'\n".encode(),
            "m3u8": playlist,
            "m3u": f"#EXTM3U\n#EXTINF:1,a\n{local}\n{url}\n".encode(),
            "pls": f"[playlist]\nFile1={local}\nFile2={url}\nNumberOfEntries=2\n".encode(),
            "asx": f'<asx version="3.0"><entry><ref href="{url}"/><ref href="{local}"/></entry></asx>'.encode(),
            "xspf": f"<playlist><trackList><track><location>{local}</location></track></trackList></playlist>".encode(),
            "mpd": f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{url}</BaseURL></MPD>'.encode(),
            "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n".encode(),
            "url": f"[InternetShortcut]\nURL={local}\n".encode(),
            "rtsptext": f"RTSPtextRTSP://{self.address}/a".encode(),
            "smil": f'<smil><body><video src="{local}"/></body></smil>'.encode(),
            "zip": _zip(path.encode()),
            "png and playlist": _picture("png") + b"\n" + playlist,
            "gif and playlist": b"GIF89a" + playlist,
            "avi with a playlist as subtitles": self._avi(playlist),
            "mp4 of references": self._mp4(local.encode()),
            "mov of references": self._reference_movie(url.encode()),
            "mkv that begins with a playlist": b"\x1aE\xdf\xa3" + playlist,
            "ts that begins with a playlist": playlist.replace(b"#EXTM3U", b"G" * 189),
            "jpeg with a url": jpeg[:2] + _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + self._svg()) + jpeg[2:],
        }

    def _svg(self) -> bytes:
        links = f'<image href="file://{self.path}"/><image xlink:href="http://{self.address}/a.png"/>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{links}</svg>'.encode()

    def _playlist(self) -> bytes:
        lines = f"file://{self.path}", f"http://{self.address}/a.ts", self.path, f"concat:{self.path}|{self.path}"
        items = "".join(f"#EXTINF:1.0,\n{line}\n" for line in lines)
        return f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXT-X-TARGETDURATION:1\n{items}#EXT-X-ENDLIST\n".encode()

    def _avi(self, playlist: bytes) -> bytes:
        """Make a clip with a playlist as its subtitles, which FFmpeg would probe."""
        avi = _clip("avi", "mpeg4")
        text = b"GAB2\0" + struct.pack("<HIHHI", 2, 0, 4, 0, len(playlist)) + playlist
        return avi + b"JUNK" + struct.pack("<I", len(text)) + text + b"00tx" + struct.pack("<I", len(text)) + text

    def _mp4(self, url: bytes) -> bytes:
        """Make a clip whose index refers to frames in another file."""
        return _with_box(mp4(), b"url ", bytes(4) + url + b"\0")

    def _reference_movie(self, url: bytes) -> bytes:
        movie = _box(b"rdrf", struct.pack(">I4sI", 0, b"url ", len(url) + 1) + url + b"\0")
        for name in (b"rmda", b"rmra", b"moov"):
            movie = _box(name, movie)
        return _box(b"ftyp", b"qt  \0\0\0\0qt  ") + movie


_NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\xff\xff\xff\x7f")


def damage_one(files: Mapping[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """Choose one of some files and damage it."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    where = rng.randrange(len(data)) if rng.randrange(3) else rng.randrange(min(len(data), 200))
    match rng.randrange(8):
        case 0:
            for _ in range(rng.choice((1, 2, 8, 50))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[where:]
        case 2:
            other = files[rng.choice(sorted(files))]
            data[where:] = other[rng.randrange(len(other)) :]
        case 3:
            data += rng.randbytes(rng.choice((1, 100, 10_000)))
        case 4:
            data[where : where + 100] = bytes(min(100, len(data) - where))
        case 5:
            data[where : where + 4] = rng.choice(_NUMBERS)
        case 6:
            data[where:where] = data[where : where + 1000] * rng.choice((1, 20))
        case _:
            del data[where : where + rng.choice((1, 4, 100))]
    return name, bytes(data)


def make_body(data: bytes, field: str, name: str, *, is_json: bool) -> tuple[str, bytes]:
    """Return content type and body of a request with a file.

    Args:
        data: content of the file.
        field: the field that takes it.
        name: the file name that the client sends.
        is_json: as a data URL in JSON, not as a part of a form.
    """
    if is_json:
        key = "video_url" if field.startswith("video") else "image_url"
        value = {key: data_url(data)} if field.endswith("reference") else data_url(data)
        return JSON, json.dumps({"prompt": "a", field: value}).encode()
    headers = b"Content-Type: image/png\r\n"  # a false content type, which the server ignores
    file = part(field.encode(), data, more=b'; filename="' + name.encode() + b'"', headers=headers)
    return MULTIPART, form(part(b"prompt", b"a"), part(b"num_inference_steps", b"2"), file)


def _picture(kind: str, *, is_animated: bool = False) -> bytes:
    stream = io.BytesIO()
    first, *more = (PIL.Image.fromarray(frame) for frame in (CLIP if is_animated else [IMAGE]))
    options = {"save_all": True, "append_images": more} if is_animated else {}
    first.save(stream, kind, **options)
    return stream.getvalue()


def _clip(container: str, codec: str) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        video: Any = out.add_stream(codec, rate=24)
        video.height, video.width = CLIP.shape[1:3]
        video.pix_fmt = "yuv420p"
        for frame in CLIP:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode(None))
    return stream.getvalue()


def _wav() -> bytes:
    samples = np.zeros(1000, np.int16).tobytes()
    head = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 1, 1, 8000, 16_000, 2, 16, b"data", len(samples))
    return b"RIFF" + struct.pack("<I", 4 + len(head) + len(samples)) + b"WAVE" + head + samples


def _zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../a.png", data)
    return stream.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def _box(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(data), name) + data


def _with_box(data: bytes, name: bytes, content: bytes) -> bytes:
    """Replace the content of an mp4's boxes of one name."""
    boxes, start = b"", 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + size]
        if kind == name:
            body = content
        elif kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            body = _with_box(body, name, content)
        elif kind == b"dref":
            body = body[:8] + _with_box(body[8:], name, content)
        boxes, start = boxes + _box(kind, body), start + size
    return boxes
