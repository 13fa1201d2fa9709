"""Every mode from the command line: the flags that it takes, the files that it writes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from cosmos3_core.generate import main
from cosmos3_core.media.probe import probe_video
from tests.mode_inputs import ACTIONS, CLIP, IMAGE

CLIP_SIZE = ["--num-frames", "9", "--height", "32", "--width", "48", "--prompt", "a car"]
# Flags, names of the files that are written, what is printed.
MODES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "text to image": (
        ["--prompt", "a car", "--num-frames", "1", "--height", "32", "--width", "48"],
        ["out.png"],
        ["out.png: 1 frames, 48x32"],
    ),
    "text to image, named": (
        ["--prompt", "a car", "--mode", "text_to_image", "--height", "32", "--width", "48", "--output", "webp"],
        ["out.webp"],
        ["out.webp: 1 frames, 48x32"],
    ),
    "text to video": (CLIP_SIZE, ["out.mp4"], ["out.mp4: 9 frames, 48x32, 24 fps, seed 42"]),
    "image to video": ([*CLIP_SIZE, "--image", "image.png"], ["out.mp4"], ["9 frames", "condition"]),
    "video to video": (
        [*CLIP_SIZE, "--video", "clip.gif", "--condition-frames", "0", "2", "--condition-keep", "last"],
        ["out.mp4"],
        ["9 frames", "condition"],
    ),
    "text to video with sound": ([*CLIP_SIZE, "--sound"], ["out.mp4"], ["24 fps, with sound", "decode_sound"]),
    "image to video with sound": (
        [*CLIP_SIZE, "--image", "image.png", "--sound", "--guidance-interval", "900", "1000"],
        ["out.mp4"],
        ["with sound"],
    ),
    "video to video with sound": ([*CLIP_SIZE, "--video", "clip.gif", "--sound"], ["out.mp4"], ["with sound"]),
    "sound alone": ([*CLIP_SIZE, "--sound", "--output", "wav"], ["out.wav"], ["out.wav: 9 frames"]),
    "forward dynamics": (
        ["--mode", "forward_dynamics", "--image", "image.png", "--actions", "actions.json", "--domain-name", "av"],
        ["out.mp4"],
        ["out.mp4: 5 frames, 48x32, 5 fps"],
    ),
    "forward dynamics of a result": (
        ["--mode", "forward_dynamics", "--video", "clip.gif", "--actions", "result.json", "--domain-id", "1"],
        ["out.mp4"],
        ["out.mp4: 5 frames"],
    ),
    "inverse dynamics": (
        ["--mode", "inverse_dynamics", "--video", "clip.gif", "--domain-name", "umi", "--action-chunk-size", "8"],
        ["out.actions.json"],
        ["out.actions.json: 8 actions of 10 numbers (umi), normalised, for want of statistics"],
    ),
    "inverse dynamics with its clip": (
        [
            *("--mode", "inverse_dynamics", "--video", "clip.gif", "--domain-name", "libero", "--raw-action-dim", "7"),
            *("--num-frames", "9", "--output", "mp4"),
        ],
        ["out.actions.json", "out.mp4"],
        ["out.mp4: 9 frames", "8 actions of 7 numbers (libero)"],
    ),
    "policy": (
        [
            *("--mode", "policy", "--image", "image.png", "--domain-name", "av", "--prompt", "go on"),
            *("--action-chunk-size", "6", "--resolution-tier", "256", "--view-point", "wrist_view"),
        ],
        ["out.actions.json", "out.mp4"],
        ["out.mp4: 5 frames, 48x32", "6 actions of 9 numbers (av)"],
    ),
    "policy, actions alone": (
        [
            *("--mode", "policy", "--video", "clip.gif", "--domain-name", "av", "--prompt", "go on"),
            *("--action-chunk-size", "4", "--output", "actions"),
        ],
        ["out.actions.json"],
        ["4 actions of 9 numbers (av)"],
    ),
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with media and actions."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.fromarray(IMAGE).save("image.png")
    first, *others = (Image.fromarray(frame) for frame in CLIP)
    first.save("clip.gif", save_all=True, append_images=others)
    Path("actions.json").write_text(json.dumps(ACTIONS[:4]))
    Path("result.json").write_text(json.dumps({"data": ACTIONS[:4], "shape": [4, 9], "domain_id": 1}))
    Path("words.json").write_text("jump")
    Path("ragged.json").write_text("[[1, 2], [3]]")
    Path("other.json").write_text('{"rows": []}')
    return folder


def run(tiny: Path, out: str | Path, *flags: str) -> int:
    return main(["--checkpoint", str(tiny), "--device", "cpu", "--steps", "2", *flags, "--out", str(out)])


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("case", MODES)
def test_a_mode_writes_its_files(
    case: str, tiny_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, names, printed = MODES[case]
    (tmp_path / "results").mkdir()
    assert run(tiny_nano, tmp_path / "results" / "out", *flags) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == names
    for text in printed:
        assert text in said.out
    assert "denoising 2/2" in said.err
    for name in names:
        check(tmp_path / "results" / name, case)


def check(path: Path, case: str) -> None:
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        assert [len(found["data"]), len(found["data"][0])] == found["shape"]
        assert found["is_normalised"] is True
    elif path.suffix == ".mp4":
        info = probe_video(path)
        assert (info.height, info.width) == (32, 48)
        with av.open(str(path)) as file:
            assert len(file.streams.audio) == case.endswith("with sound")
    elif path.suffix == ".wav":
        with av.open(str(path)) as file:
            assert file.streams.audio[0].rate == 48_000
            assert sum(frame.samples for frame in file.decode(audio=0)) == 9 * 2000
    else:
        with Image.open(path) as image:
            assert image.size == (48, 32)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded for what had to be refused")

    monkeypatch.setattr("cosmos3_core.checkpoint.load.load_parameters", refuse_to_load)


POLICY = ["--mode", "policy", "--image", "image.png", "--domain-name", "av", "--prompt", "go on"]
FORWARD = ["--mode", "forward_dynamics", "--image", "image.png", "--domain-name", "av"]


@pytest.mark.usefixtures("inputs", "no_loading")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "a car", "--mode", "t2v"], "error: mode must be one of...(got 't2v')"),
        (["--prompt", "a car", "--image", "missing.png"], "error: image must be ...(got 'missing.png'"),
        (["--prompt", "a car", "--image", "actions.json"], "error: image must be "),
        (["--prompt", "a car", "--video", "words.json"], "error: video must be "),
        (
            ["--prompt", "a car", "--image", "image.png", "--video", "clip.gif"],
            "error: image, video must be ...(got 'both'",
        ),
        (["--prompt", "a car", "--actions", "actions.json"], "error: actions must be "),
        (["--prompt", "a car", "--condition-frames", "0"], "error: condition_frame_indexes_vision must be "),
        (["--prompt", "a car", "--video", "clip.gif", "--condition-frames", "48"], "latent frames from 0 to 47"),
        (["--prompt", "a car", "--guidance-interval", "5", "1"], "error: guidance_interval must be "),
        (["--prompt", "a car", "--num-frames", "1", "--sound"], "error: generate_sound must be ...(got True"),
        (["--prompt", "a car", "--output", "wav"], "error: output must be one of ['mp4']...(got 'wav')"),
        ([*FORWARD], "error: actions must be ...(got None"),
        ([*FORWARD, "--actions", "missing.json"], "error: actions must be a JSON file...(got 'missing.json')"),
        ([*FORWARD, "--actions", "."], "error: actions must be a JSON file...(got '.')"),
        ([*FORWARD, "--actions", "image.png"], "error: actions must be a JSON file...(got 'image.png')"),
        ([*FORWARD, "--actions", "words.json"], "error: actions must be a JSON file...(got 'words.json')"),
        ([*FORWARD, "--actions", "ragged.json"], "error: actions must be ...(got [[1, 2], [3]]"),
        ([*FORWARD, "--actions", "other.json"], "error: actions must be ...(got {'rows': []}"),
        (
            [*POLICY, "--resolution-tier", "360"],
            "error: resolution_tier must be one of [256, 480, 704, 720]...(got 360)",
        ),
        ([*POLICY, "--view-point", "bird"], "error: view_point must be ...(got 'bird'"),
        ([*POLICY, "--domain-id", "2"], "error: domain_id must be ...(got 2"),
        ([*POLICY, "--raw-action-dim", "65"], "error: raw_action_dim must be ...(got 65"),
        ([*POLICY, "--num-frames", "9", "--action-chunk-size", "9"], "error: num_frames must be ...(got 9"),
        (["--prompt", ""], "error: prompt must be ...(got ''"),
        (["--prompt", "a", "--condition-keep", "middle"], "error: condition_video_keep must be ...(got 'middle')"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_bad_flag_is_one_line_and_exit_2(
    flags: list[str], said: str, tiny_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_nano, tmp_path / "out", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(part in line for part in said.split("..."))
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.usefixtures("inputs", "no_loading")
@pytest.mark.parametrize("out", ["", ".", "no/such/folder/out", "x" * 300, "nul\0", "taken"])
@pytest.mark.parametrize("flags", [[], ["--output", "actions"]], ids=" ".join)
def test_a_place_where_actions_cannot_go_is_refused_before_anything_is_loaded(
    flags: list[str], out: str, tiny_nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken.actions.json").mkdir()
    assert run(tiny_nano, out, *POLICY, *flags) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--condition-frames", "a"],
        ["--guidance-interval", "5"],
        ["--resolution-tier", "tall"],
        ["--sound", "yes"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_a_flag_that_does_not_parse_says_how(
    flags: list[str], tiny_nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tiny_nano, "out", "--prompt", "a car", *flags)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_edge_says_what_it_can_do(tiny_edge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_edge, tmp_path / "out", "--prompt", "a car", "--sound") == 2
    said = capsys.readouterr().err
    assert "can do: text_to_image, text_to_video, image_to_video, forward_dynamics" in said
    assert "makes no sound" in said
