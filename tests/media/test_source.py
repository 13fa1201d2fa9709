"""Images and clips from users: every accepted kind, and every fault refused in the same way."""

import io
import os
import random
import re
import struct
import subprocess
import sys
import wave
import zlib
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from PIL import Image

import cosmos3_core.media.source as reading
from cosmos3_core.errors import RequestError
from cosmos3_core.media import clips
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import read_frames
from cosmos3_core.media.source import (
    ClipInfo,
    PictureSize,
    pack_image,
    pack_video,
    probe_clip,
    probe_image,
    read_clip,
    read_image,
)
from cosmos3_core.presets import LIMITS


def picture(height=33, width=47):
    """uint8 RGB with four corners of different colours, which every turn tells apart."""
    rows, columns = np.mgrid[:height, :width]
    red, green = rows * 255 // height, columns * 255 // width
    return np.stack([red, green, (red + green) // 2], axis=-1).astype(np.uint8)


def save(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def encode(frames, kind="mp4", codec="libx264", *, pts=None, rotation=None, sound=False, options=None):
    """A video file of uint8 RGB frames, lossless where the codec can be."""
    file = io.BytesIO()
    container = av.open(file, "w", format=kind)
    video = container.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else options or {})
    video.height, video.width = frames.shape[1:3]
    video.pix_fmt = {"libx264": "yuv444p", "ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    video.codec_context.time_base = Fraction(1, 25)
    if rotation is not None:
        video.set_display_rotation(*rotation)
    song = container.add_stream("aac", rate=48000, layout="mono") if sound else None
    packets = []
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = index if pts is None else pts[index]
        packets += video.encode(frame)
    packets += video.encode(None)
    if song:
        for index in range(8):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48000, index * 1024
            packets += song.encode(samples)
        packets += song.encode(None)
    container.mux(packets)
    container.close()
    return file.getvalue()


def with_colour_matrix(number):
    """A clip whose colours say that they were made with a matrix of ITU-T H.273."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        video = container.add_stream("libx264", rate=25)
        video.pix_fmt = "yuv420p"
        rewriter = BitStreamFilterContext(f"h264_metadata=matrix_coefficients={number}", video, video)
        for pixels in steps(3, 480, 640):
            for packet in video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(rewriter.filter(packet))
        for packet in video.encode(None):
            container.mux(rewriter.filter(packet))
    return file.getvalue()


def brightness(frames):
    """One number a frame, coarse enough to outlive a lossy codec."""
    return [round(float(frame.mean()) / 10) for frame in frames]


def steps(num_frames, height=32, width=48):
    """A clip whose frame i is grey of level 10 i."""
    levels = np.arange(num_frames, dtype=np.uint8) * 10
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def wav():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    return file.getvalue()


@pytest.fixture(scope="module")
def mp4(clip, tmp_path_factory):
    """The shared clip as our own writer writes it."""
    path = tmp_path_factory.mktemp("mp4") / "clip.mp4"
    with Mp4Writer(path, fps=24, height=48, width=80) as writer:
        writer.write(clip)
    return path


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "gif", "jpeg"])
def test_every_kind_of_image(kind):
    data = save(picture(), kind, **({"lossless": True} if kind == "webp" else {}))
    assert probe_image("image", data) == PictureSize(33, 47)
    pixels = read_image("image", data)
    assert pixels.dtype == np.uint8
    if kind in ("gif", "jpeg"):  # lossy
        assert np.abs(pixels.astype(int) - picture()).mean() < 12
    else:
        assert (pixels == picture()).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pillow_is_what_convert_makes_of_it(mode):
    image = Image.fromarray(picture()).convert("RGBA" if mode in ("LA", "RGBA", "PA") else "RGB")
    if mode in ("LA", "RGBA", "PA"):
        image.putalpha(Image.fromarray(picture()[..., 0]))
    image = image.quantize(32) if mode == "P" else image.convert("RGB").convert(mode) if mode == "LAB" else image
    image = image if image.mode == mode else image.convert("P" if mode == "PA" else mode)
    assert (pack_image("image", image) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("CMYK", "jpeg"), ("1", "png")]
)
def test_files_of_unusual_modes(mode, kind):
    image = Image.fromarray(picture()).convert("L" if mode == "LA" else "RGB").convert(mode)
    data = save(image, kind)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    assert (read_image("image", data) == expected).all()


def test_a_palette_with_half_transparent_colours_gives_no_warning():
    image = Image.fromarray(picture()).quantize(16)
    data = save(image, "png", transparency=bytes(range(16)))
    assert (read_image("image", data) == np.asarray(image.convert("RGB"))).all()


def test_16_bits_are_scaled_and_not_clipped():
    grey = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    expected = np.repeat(np.floor(grey / 257 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
    assert expected.max() == 255
    for kind in ("png", "tiff"):
        assert (read_image("image", save(Image.fromarray(grey), kind)) == expected).all()
    assert (pack_image("image", grey) == expected).all()
    assert (pack_image("image", Image.fromarray(grey.astype(np.int32))) == expected).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind, orientation):
    upright = picture(40, 64)
    # Stored pixels that the orientation turns upright again; EXIF 2.3, table 6.
    turn_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    data = save(np.ascontiguousarray(turn_back(upright)), kind, exif=exif, **lossless)
    assert probe_image("image", data) == PictureSize(40, 64)
    tolerance = 12 if kind == "jpeg" else 0
    assert np.abs(read_image("image", data).astype(int) - upright).max() <= tolerance
    with Image.open(io.BytesIO(data)) as opened:
        assert np.abs(pack_image("image", opened).astype(int) - upright).max() <= tolerance
    assert probe_clip("video", data) == ClipInfo(40, 64, 1)


def test_exif_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(picture(), "png")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = data[:-12] + chunk + data[-12:]
    assert probe_image("image", data) == PictureSize(47, 33)
    assert (read_image("image", data) == np.rot90(picture(), -1)).all()


def test_broken_exif_counts_as_none():
    data = save(picture(), "png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (read_image("image", data) == picture()).all()


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation(kind):
    frames = [Image.fromarray(frame) for frame in steps(6)]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)
    assert brightness([read_image("image", data)]) == [0]
    assert probe_clip("video", data) == ClipInfo(32, 48, 6)
    assert brightness(read_clip("video", data, num_frames=3, keep="first")) == [0, 1, 2]
    assert brightness(read_clip("video", data, num_frames=3, keep="last")) == [3, 4, 5]
    assert brightness(read_clip("video", data, num_frames=9, keep="last")) == [0, 1, 2, 3, 4, 5]


def test_an_image_given_as_a_video_is_a_clip_of_one_frame():
    data = save(picture(), "png")
    assert probe_clip("video", data) == ClipInfo(33, 47, 1)
    assert (read_clip("video", data, num_frames=5, keep="last") == picture()[None]).all()


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_of_every_form():
    rgb = picture()
    grey = rgb[..., 0]
    assert (pack_image("image", rgb) == rgb).all()
    assert (pack_image("image", np.dstack([rgb, grey])) == rgb).all()
    for form in (grey, grey[..., None]):
        assert (pack_image("image", form) == np.dstack([grey] * 3)).all()
    assert (pack_image("image", rgb.astype(np.uint16) * 257) == rgb).all()
    assert pack_image("image", rgb.swapaxes(0, 1)).flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_range_of_floats_is_told_as_the_reference_does(dtype):
    rgb = picture()
    tolerance = 1 if dtype is np.float16 else 0
    for values in (rgb / 255, rgb / 127.5 - 1, rgb.astype(float)):
        packed = pack_image("image", values.astype(dtype)).astype(int)
        assert np.abs(packed - rgb).max() <= tolerance
    assert pack_image("image", np.full((2, 2, 3), 300, dtype)).max() == 255
    # A clip's range is that of all its frames: one dark frame does not change its own.
    clip = np.stack([rgb * 0, rgb]).astype(dtype) / dtype(127.5) - dtype(1)
    assert np.abs(pack_video("video", list(clip)).astype(int) - [rgb * 0, rgb]).max() <= tolerance


@pytest.mark.parametrize(
    "frames",
    [
        steps(4),
        list(steps(4)),
        tuple(steps(4)),
        [Image.fromarray(frame) for frame in steps(4)],
        steps(4)[..., :1],
        list(steps(4)[..., 0]),
        np.concatenate([steps(4), steps(4)[..., :1]], axis=-1),
    ],
    ids=["array", "list", "tuple", "pil", "grey", "grey list", "alpha"],
)
def test_clips_from_memory(frames):
    packed = pack_video("video", frames)
    assert (packed == steps(4)).all()
    assert probe_clip("video", packed) == ClipInfo(32, 48, 4)
    assert (read_clip("video", packed, num_frames=3, keep="first") == steps(4)[:3]).all()
    assert (read_clip("video", packed, num_frames=3, keep="last") == steps(4)[1:]).all()
    assert (read_clip("video", packed, num_frames=9, keep="last") == steps(4)).all()


def test_a_single_picture_from_memory_is_a_clip_of_one_frame():
    for single in (picture(), Image.fromarray(picture())):
        assert (pack_video("video", single) == picture()[None]).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"an array \[Y, X, 3\].*uint8 \[4, 4, 2\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "an array"),
        (np.zeros((0, 4, 3), np.uint8), "1 to"),
        (np.zeros((4, 4, 3), np.int64), "uint8, uint16 or float"),
        (np.zeros((4, 4, 3), bool), "uint8, uint16 or float"),
        (np.array([["a", "b"]]), "uint8, uint16 or float"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "infinity"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)), "a 60000 x 60000 picture"),
        (Image.fromarray(np.full((4, 4), -5, np.int32)), "0 to 65535"),
        (None, "NoneType"),
        (7, "int"),
        ([picture()], "list"),
    ],
)
def test_images_from_memory_that_are_refused(source, message):
    with pytest.raises(RequestError, match=message) as caught:
        pack_image("image", source)
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "0 frames"),
        ([picture(), picture(30, 30)], "frame 1 is"),
        ([Image.fromarray(picture()), Image.fromarray(picture(30, 30))], "frame 1 is"),
        ([picture(), Image.fromarray(picture())], "PIL images or numpy arrays"),
        ([Image.fromarray(picture()), picture()], "PIL images only"),
        ([picture(), picture().astype(float)], "frame 1 is"),
        ([np.zeros(3, np.uint8)], "frames"),
        (["a.png"], "str"),
        (np.zeros((0, 4, 4, 3), np.uint8), "an array"),
        (np.zeros((2, 4, 4, 2), np.uint8), "an array"),
        (np.zeros((10_000, 4, 4, 3), np.uint8), "10000 frames"),
        ([np.zeros((4, 4, 3), np.uint8)] * 10_000, "10000 frames"),
        (np.broadcast_to(np.uint8(0), (2, 60_000, 60_000, 3)), "60000 x 60000"),
        (np.broadcast_to(np.uint8(0), (2000, 1080, 1920, 3)), "in all frames together"),
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
        (None, "NoneType"),
        (iter([picture()]), "iterator"),
    ],
)
def test_clips_from_memory_that_are_refused(source, message):
    with pytest.raises(RequestError, match=message) as caught:
        pack_video("video", source)
    assert caught.value.field == "video"


@pytest.mark.parametrize("packed", [picture().astype(float), picture()[..., :2], steps(1), None, "x", 3])
def test_unpacked_media_are_refused(packed):
    with pytest.raises(RequestError):
        probe_image("image", packed)
    with pytest.raises(RequestError):
        read_image("image", packed)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_and_bytes(tmp_path, mp4):
    path = tmp_path / "ä b.png"
    path.write_bytes(save(picture(), "png"))
    for source in (str(path), path, path.read_bytes(), bytearray(path.read_bytes())):
        assert pack_image("image", source) == path.read_bytes()
    assert pack_video("video", str(mp4)) == mp4.read_bytes()


def test_paths_that_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with (tmp_path / "large").open("wb") as large:
        large.truncate(LIMITS.max_media_bytes + 1)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ["pipe", "empty", "large", "loop", "none", "", "n\0l", "\udcff", "x" * 5000]
    for path in [
        *(f"{tmp_path}/{name}" for name in names),
        "/dev/zero",
        "http://127.0.0.1:1/a.png",
        "file:///etc/passwd",
    ]:
        for pack in (pack_image, pack_video):
            with pytest.raises(RequestError, match=" must be ") as caught:
                pack("image", path)
            assert len(str(caught.value)) < 400
    with pytest.raises(RequestError, match=f"{LIMITS.max_media_bytes + 1} bytes"):
        pack_image("image", bytes(LIMITS.max_media_bytes + 1))
    with pytest.raises(RequestError, match="0 bytes"):
        pack_video("video", b"")


# --- clips -----------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_read_frames(mp4):
    expected = np.stack(list(read_frames(mp4)))
    data = mp4.read_bytes()
    assert probe_clip("video", data) == ClipInfo(48, 80, 13)
    for keep, part in (("first", slice(None, 5)), ("last", slice(-5, None))):
        assert (read_clip("video", data, num_frames=5, keep=keep) == expected[part]).all()
    assert (read_clip("video", data, num_frames=100, keep="first") == expected).all()
    assert (read_clip("video", data, num_frames=1, keep="last") == expected[-1:]).all()


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "mjpeg"),
        ("matroska", "ffv1"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
    ],
)
def test_every_kind_of_clip(kind, codec):
    data = encode(steps(7), kind, codec)
    info = probe_clip("video", data)
    assert info[:2] == (32, 48)
    assert info.num_frames in (None, 7)
    for keep, expected in (("first", [0, 1, 2]), ("last", [4, 5, 6])):
        assert brightness(read_clip("video", data, num_frames=3, keep=keep)) == expected


@pytest.mark.parametrize(("height", "width"), [(33, 47), (32, 47), (17, 16), (2, 2)])
def test_odd_sizes_and_one_frame(height, width):
    frames = steps(1, height, width) + 100
    data = encode(frames, "mp4", "libx264")
    assert probe_clip("video", data) == ClipInfo(height, width, 1)
    assert brightness(read_clip("video", data, num_frames=9, keep="first")) == [10]


def test_frames_of_a_variable_rate_count_once_each():
    data = encode(steps(6), pts=[0, 1, 2, 30, 31, 100])
    assert probe_clip("video", data).num_frames == 6
    assert brightness(read_clip("video", data, num_frames=4, keep="last")) == [2, 3, 4, 5]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize(("kind", "mirrored"), [("mp4", False), ("mp4", True), ("matroska", False)])
def test_rotation_of_the_file(kind, degrees, mirrored):
    stored = np.stack([picture(32, 48)] * 2)
    data = encode(stored, kind, rotation=(degrees, mirrored))
    expected = np.rot90(stored, degrees // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirrored else expected
    assert probe_clip("video", data)[:2] == expected.shape[1:3]
    pixels = read_clip("video", data, num_frames=2, keep="first")
    assert np.abs(pixels.astype(int) - expected).max() < 6


def test_sound_is_ignored():
    frames = steps(5)
    data = encode(frames, sound=True)
    assert probe_clip("video", data) == ClipInfo(32, 48, 5)
    assert brightness(read_clip("video", data, num_frames=2, keep="last")) == [3, 4]


def test_a_file_of_fragments():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        video = container.add_stream("libx264", rate=25, options={"g": "3", "qp": "0"})
        video.height, video.width, video.pix_fmt = 32, 48, "yuv444p"
        for frame in steps(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    data = file.getvalue()
    assert probe_clip("video", data) == ClipInfo(32, 48, None)
    assert brightness(read_clip("video", data, num_frames=3, keep="last")) == [9, 10, 11]


def test_frames_that_an_edit_cuts_away_are_not_shown():
    frames = steps(10)
    data = encode(frames, codec="mjpeg", kind="mov")
    at = data.find(b"elst")
    # version and flags, one edit: duration, media time, rate
    duration, media_time = struct.unpack(">Ii", data[at + 12 : at + 20])
    step = duration // 10
    time_scale_at = data.find(b"mdhd") + 16
    per_frame = struct.unpack(">I", data[time_scale_at : time_scale_at + 4])[0] // 25
    edited = data[: at + 12] + struct.pack(">Ii", 6 * step, media_time + 4 * per_frame) + data[at + 20 :]
    shown = read_clip("video", edited, num_frames=99, keep="first")
    assert brightness(shown) == [4, 5, 6, 7, 8, 9]
    assert probe_clip("video", edited).num_frames == 6


# --- faults ----------------------------------------------------------------------------------------------------------


def catch_refusal(call, *arguments, **options):
    with pytest.raises(RequestError) as caught:
        call("given", *arguments, **options)
    assert caught.value.field == "given"
    assert len(str(caught.value)) < 700
    return str(caught.value)


def both_refuse(data):
    """Read a clip; return the refusals of probe and reader, each or ""."""
    try:
        probe_clip("given", data)
        probed = ""
    except RequestError as error:
        probed = str(error)
    return probed, catch_refusal(read_clip, data, num_frames=10**6, keep="last")


def test_a_video_as_an_image_and_sound_as_a_clip(mp4):
    assert "which is a video" in catch_refusal(probe_image, mp4.read_bytes())
    assert "give it as a video" in catch_refusal(read_image, mp4.read_bytes())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        song = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux([*song.encode(frame), *song.encode(None)])
    for data in (wav(), b"ID3\4" + bytes(200), b"\xff\xfb\x90\0" + bytes(200), file.getvalue()):
        assert "no video stream" in catch_refusal(probe_clip, data)
        assert "no video stream" in catch_refusal(read_clip, data, num_frames=1, keep="first")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "<?xml version='1.0'?><MPD><BaseURL>{path}</BaseURL></MPD>",
        "<svg xmlns:xlink='http://www.w3.org/1999/xlink'><image xlink:href='{path}'/></svg>",
        "%!PS-Adobe-3.0 EPSF-3.0\n({path}) run\n",
        "concat:{path}|{path}",
        "{path}",
    ],
)
def test_playlists_and_scripts_open_nothing(text, mp4, monkeypatch):
    opened = []
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
    data = text.format(path=mp4).encode()
    assert "unknown" in catch_refusal(probe_clip, data)
    assert "unknown" in catch_refusal(probe_image, data)
    assert opened == []


def test_a_playlist_behind_the_signature_of_an_mp4_opens_nothing(tmp_path, mp4):
    """A file with the signature of an MP4 is read by the MP4 demuxer alone, which opens no other file."""
    os.mkfifo(tmp_path / "pipe")  # to open it would block
    playlist = f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/pipe\n{mp4}\n".encode()
    both = both_refuse(struct.pack(">I", 16) + b"ftypisom\0\0\0\0" + playlist)
    assert all(both)
    # A track whose frames lie in another file: the flag "in this file" taken away, and a path put in.
    data = bytearray(encode(steps(2)))
    at = data.find(b"url ")
    data[at + 4 : at + 8] = bytes(4)
    probed, _ = probe_clip("given", bytes(data)), None
    assert probed == ClipInfo(32, 48, 2)


@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.8, 0.95, 0.999])
def test_cut_mp4s(mp4, part):
    front = mp4.read_bytes()  # the index in front
    back = encode(np.random.default_rng(0).integers(0, 255, (9, 48, 80, 3)).astype(np.uint8))
    for data in (front, back):
        probed, read = both_refuse(data[: int(len(data) * part)])
        assert probed
        assert read


def test_an_mp4_whose_frames_are_garbage(mp4):
    data = bytearray(mp4.read_bytes())
    at = data.find(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    assert all(both_refuse(bytes(data)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.0, 0.05, 0.4, 0.9])
def test_cut_images(kind, part):
    whole = save(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8), kind)
    data = whole[: int(len(whole) * part)] or whole[:4]
    catch_refusal(read_image, data)
    catch_refusal(read_clip, data, num_frames=1, keep="first")


def test_cut_animations():
    frames = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), np.uint8)]
    for kind in ("gif", "webp", "png"):
        data = save(frames[0], kind, save_all=True, append_images=frames[1:])
        catch_refusal(read_clip, data[: int(len(data) * 0.7)], num_frames=6, keep="last")


def test_lying_signatures(mp4):
    bodies = (mp4.read_bytes(), save(picture(), "png"), wav(), bytes(300), b"\xff" * 300)
    heads = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypisom")
    heads += (b"RIFF\0\1\0\0WEBPVP8X", b"RIFF\0\1\0\0AVI ", b"G" + bytes(187) + b"G")
    for head in heads:
        for body in bodies:
            catch_refusal(read_image, head + body)
            assert both_refuse(head + body)[1]


def test_colours_that_cannot_be_converted_are_refused_before_anything_is_made():
    assert len(read_clip("video", with_colour_matrix(1), num_frames=1, keep="first")) == 1, "BT.709"
    ictcp = with_colour_matrix(14)
    for read in (lambda: probe_clip("video", ictcp), lambda: read_clip("video", ictcp, num_frames=1, keep="first")):
        with pytest.raises(RequestError, match=r"video must be .*'a clip with colour matrix 14 \(.*convert it first"):
            read()


def test_random_damage_raises_nothing_else(mp4):
    """Bytes changed at random: the file is read or refused, whatever is hit."""
    frames = [Image.fromarray(frame) for frame in steps(3)]
    wholes = [save(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("gif", "webp", "png", "tiff")]
    wholes += [
        save(picture(), "jpeg"),
        save(picture(), "bmp"),
        mp4.read_bytes(),
        encode(steps(3), "matroska", "ffv1"),
    ]
    wholes += [encode(steps(3), "avi", "mpeg4"), encode(steps(3), "mpegts", "mpeg2video")]
    choose = random.Random(0)
    refused = 0
    for _ in range(40):
        for whole in wholes:
            data = bytearray(whole)
            for _ in range(choose.choice([1, 4, 30])):
                data[choose.randrange(len(data) if choose.random() < 0.5 else 64)] = choose.randrange(256)
            for read in (lambda data: read_image("given", data), probe_both_and_read):
                try:
                    read(bytes(data))
                except RequestError:
                    refused += 1
    assert refused > 50


def probe_both_and_read(data):
    probe_clip("given", data)
    return read_clip("given", data, num_frames=2, keep="last")


# --- bombs -----------------------------------------------------------------------------------------------------------


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + pixels


def gif_header(canvas, frame, num_frames=2):
    head = b"GIF89a" + struct.pack("<HH", *canvas) + b"\0\0\0"
    image = b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\2\2\x4c\1\0"
    return head + image * num_frames + b";"


def tiny_frames(num_frames, kind):
    """Frames of 16 x 16, each the same few bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        video = container.add_stream("mpeg4", rate=25)
        video.height, video.width, video.pix_fmt = 16, 16, "yuv420p"
        packets = [
            *video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")),
            *video.encode(None),
        ]
        data = bytes(packets[0])
        for index in range(num_frames):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = video, index, index, True
            packet.time_base = Fraction(1, 25)
            container.mux(packet)
    return file.getvalue()


def many_samples(data, count, *tables):
    """An mp4 whose tables name ``count`` samples of one byte."""
    data = bytearray(data)
    for name, at, value in tables:
        position = data.find(name) + at
        data[position : position + 4] = struct.pack(">I", count if value is None else value)
    return bytes(data)


def resize_header(height, width):
    """An mp4 whose header says 16 x 16 and whose stream is much larger."""
    data = bytearray(encode(np.zeros((1, height, width, 3), np.uint8), codec="mpeg4"))
    for at in (match.start() for match in re.finditer(b"mp4v", bytes(data))):
        data[at + 28 : at + 32] = struct.pack(">HH", 16, 16)
    at = data.find(b"tkhd")
    data[at + 80 : at + 88] = struct.pack(">II", 16 << 16, 16 << 16)
    return bytes(data)


def bombs():
    """Name -> (a crafted file, what its refusal says)."""
    small = encode(steps(3))
    webp = bytearray(save(Image.fromarray(np.zeros((8, 8, 4), np.uint8)), "webp", exif=b"Exif\0\0II*\0\0\0\0\0"))
    webp[24:30] = b"\xfe\x3f\0" * 2
    sizes = (b"stsz", 8, 1), (b"stsz", 12, None), (b"stsc", 16, None)
    return {
        "png header": (png_header(60_000, 60_000), "60000 x 60000"),
        "png of 2**31": (png_header(2**31 - 1, 2**31 - 1), "x"),
        "gif canvas": (gif_header((65_535, 65_535), (1, 1)), "65535 x 65535"),
        "gif frame": (gif_header((16, 16), (13_000, 13_000)), "larger than the canvas"),
        "gif of 10,000": (gif_header((16, 16), (16, 16), 10_000), "10000 frames"),
        "webp canvas": (bytes(webp), "16383 x 16383"),
        "bmp header": (b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6), "60000"),
        "tiff header": (tiff_header(60_000, 60_000), "60000"),
        "jpeg header": (jpeg_header(60_000, 60_000), "60000"),
        "mp4 of 10,000": (tiny_frames(10_000, "mp4"), "10000 frames"),
        "mkv of 10,000": (tiny_frames(10_000, "matroska"), "frames"),
        "mp4 samples": (many_samples(small, 50_000_000, *sizes), "50000000 frames"),
        "mp4 times": (many_samples(small, 4_000_000_000, (b"stts", 12, None)), "4000000000 frames"),
        "mp4 edits": (many_samples(small, 1_000_000, (b"elst", 8, None)), "1000000 edits"),
        "stream larger than its header": (resize_header(8000, 8000), "larger than 16777216 pixels"),
    }


def tiff_header(width, height):
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, height)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, 100)])
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 8) + entries + bytes(104)


def jpeg_header(width, height):
    data = bytearray(save(picture(), "jpeg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


PEAK = """
import re, sys
from pathlib import Path
from cosmos3_core.errors import RequestError
from cosmos3_core.media.source import probe_clip, probe_image, read_clip, read_image

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    said = []
    for call in (probe_image, read_image, probe_clip, lambda *a: read_clip(*a, num_frames=9, keep="last")):
        try:
            call("given", data)
        except RequestError as error:
            said.append(str(error))
    print(path.name, len(said), round(memory("VmHWM") - before), " ".join(said).replace(chr(10), " "), sep="|")
"""


def test_bombs_are_refused_without_allocating_their_memory(tmp_path):
    expected = bombs()
    for name, (data, _) in expected.items():
        assert len(data) < 2**22, name
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-W", "error", "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    lines = [line.split("|", 3) for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == set(expected)
    for name, refusals, grown_mib, said in lines:
        assert int(refusals) >= 3, (name, said)  # a gif that has too many frames as a clip is an image still
        assert expected[name][1] in said, (name, said)
        assert int(grown_mib) < 150, name


def test_a_large_picture_of_nothing_is_read():
    """Small as a file and within the limit of pixels: that is no bomb."""
    data = save(Image.new("1", (6000, 6000)), "png")
    assert len(data) < 10_000
    assert read_image("image", data).shape == (6000, 6000, 3)


def test_the_frames_asked_for_have_to_fit_in_memory(monkeypatch):
    monkeypatch.setattr(reading, "LIMITS", replace(LIMITS, max_clip_total_pixels=32 * 48 * 4))
    for kind in ("mp4", "matroska"):
        data = encode(steps(6), kind)
        assert len(read_clip("video", data, num_frames=4, keep="last")) == 4
        for keep in ("first", "last"):
            with pytest.raises(RequestError, match="in all frames together"):
                read_clip("video", data, num_frames=5, keep=keep)


def test_decoding_stops_when_the_first_frames_are_there(monkeypatch):
    decoded = []
    frames = clips.OpenClip.frames
    monkeypatch.setattr(clips.OpenClip, "frames", lambda self: (decoded.append(f) or f for f in frames(self)))
    read_clip("video", encode(steps(12)), num_frames=2, keep="first")
    assert len(decoded) == 2
