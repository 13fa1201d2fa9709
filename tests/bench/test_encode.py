"""`bench encode`: synthetic frames, the writer and PyAV's x264 beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cosmos3_core.bench.__main__ import main
from cosmos3_core.bench.encode import Footage, Settings, write_ours, write_theirs
from cosmos3_core.media.probe import probe_video, read_frames

MEASURES = [("whole clip", "s"), ("whole clip", "frames/s"), ("first packet", "frames")]
MEASURES += [("peak memory", "MB"), ("file", "bytes")]


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "encode.json"
    shape = ["--num-frames", "60", "--height", "32", "--width", "48"]
    assert main(["encode", *shape, "--runs", "2", "--json", str(path)]) == 0
    output = capsys.readouterr().out
    report = json.loads(path.read_text())
    names = ["H.264, crf 18", "lossless"]
    expected = [(f"{name}: {measure}", unit) for name in names for measure, unit in MEASURES]
    assert [(row["measure"], row["unit"]) for row in report["measures"]] == expected
    assert report["reference"] == "PyAV's x264"
    rows = {(row["measure"], row["unit"]): row for row in report["measures"]}
    for (measure, unit), row in rows.items():
        assert measure in output
        for side in ("ours", "theirs"):
            assert row[side]["median"] > 0
            assert row[side]["runs"] == (2 if unit in ("s", "frames/s") else 1)
    # x264 looks some forty frames ahead unless told otherwise.
    first_packet = rows["H.264, crf 18: first packet", "frames"]
    assert 4 < first_packet["ours"]["median"] < 20 < first_packet["theirs"]["median"] < 60
    for side in ("ours", "theirs"):
        # Without prediction from later frames there is nothing to wait for.
        assert rows["lossless: first packet", "frames"][side]["median"] < 10
        crf, lossless = (rows[f"{name}: file", "bytes"][side]["median"] for name in names)
        assert crf < lossless / 2
    assert {note.split(":")[0].split(" is ")[0] for note in report["notes"]} == {"First packet", "Peak memory"}


def test_a_clip_that_ends_before_the_first_packet_has_no_delay(tmp_path: Path) -> None:
    footage = Footage(5, 32, 48)
    for write in (write_ours, write_theirs):
        encoded = write(tmp_path / "clip.mp4", footage, footage.chunks(), Settings())
        assert encoded.delays == []
        assert encoded.num_bytes == (tmp_path / "clip.mp4").stat().st_size
        assert probe_video(tmp_path / "clip.mp4").num_frames == 5


def test_both_sides_encode_the_same_frames(tmp_path: Path) -> None:
    """Lossless gives the frames back on both, within what yuv420p leaves of them."""
    footage = Footage(6, 32, 48)
    frames = np.concatenate(list(footage.chunks())).astype(int)
    for write in (write_ours, write_theirs):
        write(tmp_path / "clip.mp4", footage, footage.chunks(), Settings(lossless=True))
        stored = np.stack(list(read_frames(tmp_path / "clip.mp4"))).astype(int)
        assert np.abs(stored.mean((1, 2)) - frames.mean((1, 2))).max() < 8


def test_the_footage_is_the_same_every_time_and_moves() -> None:
    footage = Footage(6, 34, 50)
    first, again = list(footage.chunks()), list(footage.chunks())
    assert [chunk.shape for chunk in first] == [(4, 34, 50, 3), (2, 34, 50, 3)]
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    frames = np.concatenate(first)
    assert len({frame.tobytes() for frame in frames}) == 6
    assert frames.min() < 60
    assert frames.max() > 180


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--height", "33"], "height must be a multiple of 2 (got 33)"),
        (["--num-frames", "1200", "--height", "720", "--width", "1280"], "num_frames must be a clip of at most"),
        (["--num-frames", "5", "--preset", "fastest"], "preset must be one of ['ultrafast', "),
        (["--json", "/nowhere/x.json"], "json must be a file in an existing"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--height", "32", "--width", "48", *flags]
    assert main(["encode", *shape]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
