"""The mp4 writer: what is in the file, that its bytes are reproducible, and that failures leave nothing."""

import hashlib
import io
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.mp4 import Mp4Writer, encoder_threads
from cosmos3_core.media.probe import probe_video, read_frames
from cosmos3_core.shapes import frame_rate


def encode(target, clip, fps=24, **options):
    with Mp4Writer(target, fps=fps, height=clip.shape[1], width=clip.shape[2], **options) as writer:
        writer.write(clip)


def psnr_db(first, second):
    return 10 * np.log10(255**2 / np.square(first.astype(float) - second).mean())


def bt709_limited(rgb):
    """The formula of BT.709 for one RGB colour: (Y, Cb, Cr), 8 bit, limited range, not rounded."""
    red, green, blue = np.asarray(rgb) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748


def yuv_planes(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def top_level_boxes(data):
    """The names of an mp4 file's outermost boxes, in file order."""
    names, position = [], 0
    while position < len(data):
        num_bytes = int.from_bytes(data[position : position + 4], "big")
        names.append(data[position + 4 : position + 8].decode("ascii"))
        assert num_bytes >= 8, "the files of this test need neither 64-bit nor open-ended boxes"
        position += num_bytes
    assert position == len(data)
    return names


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(24, Fraction(24)), (23.976, Fraction(24000, 1001)), (16, Fraction(16)), (12.5, Fraction(25, 2))],
)
@pytest.mark.parametrize("num_frames", [1, 13])
def test_frames_rate_and_size_are_exact(tmp_path, clip, fps, expected, num_frames):
    path = tmp_path / "clip.mp4"
    encode(path, clip[:num_frames], fps=fps)
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (num_frames, expected)
    assert (info.height, info.width) == (48, 80)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    assert info.duration_s == pytest.approx(num_frames / expected, abs=1e-9)


def test_frames_come_back_in_order_and_close_to_what_went_in(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    encode(path, clip)
    decoded = np.stack(list(read_frames(path)))
    assert decoded.shape == clip.shape
    assert decoded.dtype == np.uint8
    # Each frame, so that a swapped pair cannot hide in the mean. Chroma at half resolution sets the ceiling.
    assert min(psnr_db(*pair) for pair in zip(decoded, clip, strict=True)) > 36


def test_a_lower_crf_is_closer_and_larger(tmp_path, clip):
    for crf in (10, 30):
        encode(tmp_path / f"{crf}.mp4", clip, crf=crf)
    fine, coarse = (np.stack(list(read_frames(tmp_path / f"{crf}.mp4"))) for crf in (10, 30))
    assert psnr_db(fine, clip) > psnr_db(coarse, clip) + 3
    assert (tmp_path / "10.mp4").stat().st_size > (tmp_path / "30.mp4").stat().st_size


@pytest.mark.parametrize("rgb", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 77)])
def test_colours_are_limited_range_bt709(tmp_path, rgb):
    path = tmp_path / "colour.mp4"
    encode(path, np.full((1, 32, 32, 3), rgb, np.uint8), lossless=True)
    (planes,) = yuv_planes(path)
    luma, chroma = planes[:32], planes[32:].reshape(2, -1)
    expected = bt709_limited(rgb)
    assert np.abs(luma - expected[0]).max() < 0.6
    assert np.abs(chroma[0] - expected[1]).max() < 0.6
    assert np.abs(chroma[1] - expected[2]).max() < 0.6


def test_colour_is_tagged(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    encode(path, clip)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
    assert tags == (1, 1, 1, 1)  # limited range, and BT.709 three times, in FFmpeg's numbers
    assert b"colrnclx" in path.read_bytes()


def test_lossless_keeps_every_yuv_sample(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    path = tmp_path / "noise.mp4"
    encode(path, noise, lossless=True)
    for frame, planes in zip(noise, yuv_planes(path), strict=True):
        luma, blue_difference, red_difference = bt709_limited(np.moveaxis(frame, -1, 0))
        assert np.abs(planes[:32] - luma).max() < 0.6
        for stored, exact in zip(planes[32:].reshape(2, 16, 32), (blue_difference, red_difference), strict=True):
            assert np.abs(stored - exact.reshape(16, 2, 32, 2).mean(axis=(1, 3))).max() < 0.6


def test_the_index_comes_first(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    encode(path, clip)
    names = top_level_boxes(path.read_bytes())
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


def test_frames_that_are_a_view_in_another_memory_order(tmp_path, clip):
    view = np.ascontiguousarray(clip.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert not view.flags.c_contiguous
    encode(tmp_path / "view.mp4", view)
    encode(tmp_path / "array.mp4", clip)
    assert (tmp_path / "view.mp4").read_bytes() == (tmp_path / "array.mp4").read_bytes()


# --- reproducible ----------------------------------------------------------------------------------------------------


def test_chunks_give_the_bytes_of_one_write(tmp_path, clip):
    encode(tmp_path / "whole.mp4", clip)
    with Mp4Writer(tmp_path / "chunks.mp4", fps=24, height=48, width=80) as writer:
        for chunk in (clip[:1], clip[1:1], clip[1:5], clip[5:]):
            writer.write(chunk)
        assert writer.num_frames == 13
    assert (tmp_path / "chunks.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_stream_gets_the_bytes_of_the_file(tmp_path, clip):
    encode(tmp_path / "clip.mp4", clip)
    stream = io.BytesIO()
    stream.write(b"before")
    encode(stream, clip)
    assert not stream.closed
    assert stream.getvalue() == b"before" + (tmp_path / "clip.mp4").read_bytes()


def test_no_date_is_written(tmp_path, clip):
    encode(tmp_path / "clip.mp4", clip)
    data = (tmp_path / "clip.mp4").read_bytes()
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        version_flags = data.index(box) + 4
        assert data[version_flags] == 0, "version 0: creation and modification time are 4 bytes each"
        assert data[version_flags + 4 : version_flags + 12] == bytes(8)


_SUBPROCESS = """
import sys
import numpy as np
from cosmos3_core.media.mp4 import Mp4Writer
clip = np.load(sys.argv[1])
with Mp4Writer(sys.argv[2], fps=24, height=clip.shape[1], width=clip.shape[2]) as writer:
    writer.write(clip)
"""


def test_two_processes_write_the_same_bytes(tmp_path, clip):
    np.save(tmp_path / "clip.npy", clip)
    digests = []
    for name in ("first.mp4", "second, under another name.mp4"):
        command = [sys.executable, "-c", _SUBPROCESS, str(tmp_path / "clip.npy"), str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=60)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1]


# --- failures --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the one before")
    with pytest.raises(Interrupted), Mp4Writer(path, fps=24, height=48, width=80) as writer:
        writer.write(clip)
        raise Interrupted
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_at_close_and_not_before(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    writer = Mp4Writer(path, fps=24, height=48, width=80)
    writer.write(clip)
    assert not path.exists()
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == [path]
    assert probe_video(path).num_frames == 13


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(28, "No space left on device"), MediaError),
        (av.error.MemoryError(12, "Cannot allocate memory"), MemoryError),
        (MemoryError("5 GiB"), MemoryError),
    ],
)
def test_a_failing_encoder_leaves_nothing(tmp_path, clip, monkeypatch, failure, raised):
    """Without memory it is the request that asks for too much; the disk and the encoder work."""
    writer = Mp4Writer(tmp_path / "clip.mp4", fps=24, height=48, width=80)
    writer.write(clip[:2])

    def fail(packets):
        raise failure

    class FailingContainer:
        mux = staticmethod(fail)
        close = writer._container.close

    monkeypatch.setattr(writer, "_container", FailingContainer())
    with pytest.raises(Exception, match=rf"stopped at frame 2: {re.escape(str(failure))}") as caught:
        writer.write(clip[2:])
    assert type(caught.value) is raised
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ClosedError):
        writer.write(clip)


def test_a_stream_stays_empty_when_the_run_fails(clip):
    stream = io.BytesIO()
    with pytest.raises(Interrupted), Mp4Writer(stream, fps=24, height=48, width=80) as writer:
        writer.write(clip)
        raise Interrupted
    assert stream.getvalue() == b""


def test_without_frames_there_is_no_file(tmp_path):
    with (
        pytest.raises(MediaError, match="no frame was written"),
        Mp4Writer(tmp_path / "a.mp4", fps=24, height=48, width=80),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_use_after_close_is_refused(tmp_path, clip):
    writer = Mp4Writer(tmp_path / "clip.mp4", fps=24, height=48, width=80)
    writer.write(clip)
    writer.close()
    with pytest.raises(ClosedError, match="open a new one"):
        writer.write(clip)
    with pytest.raises(ClosedError), writer:
        pass
    writer.abort()
    assert (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 48, 80, 3), np.float32),
        np.zeros((48, 80, 3), np.uint8),
        np.zeros((2, 80, 48, 3), np.uint8),
        np.zeros((2, 3, 48, 80), np.uint8),
        [[0]],
    ],
    ids=["float", "one frame", "turned", "channels first", "list"],
)
def test_wrong_frames_are_refused_and_the_writer_goes_on(tmp_path, clip, frames):
    with Mp4Writer(tmp_path / "clip.mp4", fps=24, height=48, width=80) as writer:
        with pytest.raises(RequestError, match=r"a uint8 array \[F, 48, 80, 3\]"):
            writer.write(frames)
        writer.write(clip)
    assert probe_video(tmp_path / "clip.mp4").num_frames == 13


@pytest.mark.parametrize(
    ("size", "threads"),
    [
        ((32, 32), 1),
        ((192, 320), 1),
        ((512, 512), 1),
        ((512, 514), 2),
        ((480, 832), 2),
        ((720, 1280), 4),
        ((1024, 1024), 4),
        ((8192, 8192), 16),
    ],
)
def test_larger_frames_take_more_threads(size: tuple[int, int], threads: int) -> None:
    assert encoder_threads(*size) == threads


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 47),
        ("width", 81),
        ("height", 0),
        ("width", 80.0),
        ("crf", 52),
        ("crf", True),
        ("preset", "warp"),
        ("threads", 0),
        ("threads", 17),
        ("fps", 0),
        ("fps", float("nan")),
        ("fps", "24"),
    ],
)
def test_wrong_settings_name_the_field(tmp_path, field, value):
    settings = {"fps": 24, "height": 48, "width": 80, field: value}
    with pytest.raises(RequestError) as caught:
        Mp4Writer(tmp_path / "clip.mp4", **settings)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["missing/clip.mp4", "."])
def test_an_unusable_path_is_refused_before_anything_is_encoded(tmp_path, target):
    with pytest.raises(RequestError, match="target must be "):
        Mp4Writer(tmp_path / target, fps=24, height=48, width=80)


def test_a_size_that_the_encoder_refuses_is_a_media_error(tmp_path):
    with pytest.raises(MediaError, match="did not start for 20000x48"):
        Mp4Writer(tmp_path / "clip.mp4", fps=24, height=48, width=20000)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_looks_like_a_url_is_a_file(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode("http:clip%03d.mp4", clip)
    assert [path.name for path in Path().iterdir()] == ["http:clip%03d.mp4"]
    assert probe_video("http:clip%03d.mp4").num_frames == 13


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24.0, Fraction(24)),
        (29.97, Fraction(30000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (14.985, Fraction(15000, 1001)),
        (12.5, Fraction(25, 2)),
        (23.5, Fraction(47, 2)),
        (1, Fraction(1)),
        (240, Fraction(240)),
    ],
)
def test_frame_rate(fps, expected):
    assert frame_rate(fps) == expected
