"""The main path, from the command line and from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos3_core.denoiser import StepEvent
from cosmos3_core.engine import Engine
from cosmos3_core.generate import generate, main
from cosmos3_core.media.pixels import FrameHash
from cosmos3_core.media.probe import probe_video, read_frames
from cosmos3_core.phyai import Cosmos3GenerationPostProcessor, Cosmos3Processor, Cosmos3T2VRequest
from cosmos3_core.request import GenerationRequest
from cosmos3_core.shapes import pixel_to_latent_shape

SMALL = GenerationRequest(prompt="A red car.", num_frames=9, height=80, width=64, fps=16, num_inference_steps=3)


@pytest.fixture
def engine(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> Engine:
    return engine_for(tiny_nano)


def test_a_prompt_becomes_a_playable_mp4(engine: Engine, tmp_path: Path) -> None:
    events: list[StepEvent] = []
    result = generate(engine, SMALL, tmp_path / "clip", on_step=events.append)
    assert result.path == tmp_path / "clip.mp4"
    info = probe_video(result.path)
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 80, 64, 16)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    assert [event.step for event in events] == [1, 2, 3]
    assert events[-1].sigma == 0
    assert events[0].sigma > events[1].sigma > 0
    assert list(result.timings_s) == ["preprocess", "inference", "denoise", "decode", "to_cpu", "encode"]
    assert result.timings_s["inference"] == result.timings_s["denoise"] + result.timings_s["decode"]
    assert result.negative_prompt_origin == "built-in"
    assert len(result.frames_sha256) == 64


def test_the_same_request_gives_the_same_bytes_and_another_seed_does_not(engine: Engine, tmp_path: Path) -> None:
    first, second = (generate(engine, SMALL, tmp_path / name) for name in ("a", "b"))
    assert first.path is not None
    assert second.path is not None
    assert first.frames_sha256 == second.frames_sha256
    assert first.path.read_bytes() == second.path.read_bytes()
    other = generate(engine, replace(SMALL, seed=43), tmp_path / "c")
    assert other.frames_sha256 != first.frames_sha256


def test_one_frame_becomes_a_png(engine: Engine, tmp_path: Path) -> None:
    result = generate(engine, replace(SMALL, num_frames=1), tmp_path / "image")
    assert result.path == tmp_path / "image.png"
    (frame,) = read_frames(result.path)
    digest = FrameHash()
    digest.update(frame[None])
    assert digest.hexdigest() == result.frames_sha256


def test_latents_can_be_asked_for(engine: Engine, tmp_path: Path) -> None:
    result = generate(engine, SMALL, output="latent")
    assert result.path is None
    assert result.latents is not None
    assert {name: tuple(x.shape) for name, x in result.latents.items()} == {"video": (1, 48, 3, 5, 4)}
    again = generate(engine, replace(SMALL, noise=None), output="latent")
    assert again.latents is not None
    assert torch.equal(again.latents["video"], result.latents["video"])


def test_the_library_gives_what_the_main_path_gives(engine: Engine, tiny_nano: Path, tmp_path: Path) -> None:
    """The session that README shows: processor, request, step, post-processor."""
    processor = Cosmos3Processor(tiny_nano / "text_tokenizer", fps=16, num_frames=9, height=80, width=64)
    cond, uncond = processor.tokenize_pair("A red car.")
    request = Cosmos3T2VRequest(
        text_ids=cond.text_ids,
        text_mask=cond.text_mask,
        neg_text_ids=uncond.text_ids,
        neg_text_mask=uncond.text_mask,
        video_shape=pixel_to_latent_shape(9, 80, 64),
        fps=16,
        num_inference_steps=3,
    )
    pixels = engine.step(request)
    assert pixels.shape == (1, 3, 9, 80, 64)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    post = Cosmos3GenerationPostProcessor(fps=16)
    media = post.postprocess(pixels)
    path = post.save_mp4(media, tmp_path / "library.mp4")
    result = generate(engine, SMALL, tmp_path / "main")
    assert result.path is not None
    digest = FrameHash()
    digest.update(media.frames)
    assert digest.hexdigest() == result.frames_sha256
    assert path.read_bytes() == result.path.read_bytes()

    latents = engine.step(request, output="latent")
    assert latents.shape == (1, 48, 3, 5, 4)


def test_padding_on_the_right_changes_nothing(engine: Engine) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = Cosmos3T2VRequest(ids, torch.ones_like(ids), ids[:, :2], torch.ones(1, 2), (1, 3, 2), num_inference_steps=2)
    padded = replace(plain, text_ids=torch.tensor([[5, 6, 7, 0, 0]]), text_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert torch.equal(engine.step(plain, output="latent"), engine.step(padded, output="latent"))


def test_what_a_step_callback_raises_ends_the_run_and_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: StepEvent) -> None:
        raise Stop

    with pytest.raises(Stop):
        generate(engine, SMALL, tmp_path / "clip", on_step=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "schedule"),
    [([], "native"), (["--use-karras-sigmas", "true"], "karras"), (["--use-karras-sigmas", "auto"], "karras")],
)
def test_the_command_line_writes_the_file_of_its_flags(
    flag: list[str], schedule: str, tiny_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--checkpoint", str(tiny_nano), "--prompt", "A red car.", "--negative-prompt", "", "--num-frames", "4"),
        *("--height", "64", "--width", "48", "--steps", "3", "--guidance-scale", "3", "--flow-shift", "5"),
        *("--fps", "24", "--seed", "7", "--out", str(tmp_path / "clip"), "--device", "cpu"),
    ]
    assert main([*arguments, *flag]) == 0
    output = capsys.readouterr()
    assert f"5 frames, 48x64, 24 fps, seed 7, {schedule} schedule, negative prompt: empty" in output.out
    for stage in ("model_load", "preprocess", "inference", "denoise", "decode", "to_cpu", "encode"):
        assert stage in output.out
    assert "num_frames=4 was rounded up to 5" in output.err
    assert "denoising 3/3" in output.err
    assert probe_video(tmp_path / "clip.mp4").num_frames == 5


def test_the_command_runs_as_a_module(tiny_nano: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cosmos3_core.generate", "--checkpoint", str(tiny_nano), "--prompt", "A red car."]
    size = ["--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--out", str(tmp_path / "clip")]
    subprocess.run([*command, *size], check=True, timeout=100, capture_output=True)
    assert probe_video(tmp_path / "clip.mp4").num_frames == 5


def test_defaults_are_the_published_ones(engine: Engine) -> None:
    from cosmos3_core.resolve import resolve

    layout = replace(engine.layout, variant="nano")
    video = resolve(GenerationRequest(prompt="a car"), layout)
    assert (video.num_frames, video.height, video.width, video.fps) == (189, 720, 1280, 24.0)
    assert (video.num_inference_steps, video.guidance_scale, video.flow_shift) == (35, 6.0, 10.0)
    assert (video.schedule, video.seed, video.prompt_format.use_system_prompt) == ("native", 42, False)
    image = resolve(GenerationRequest(prompt="a car", num_frames=1), layout)
    assert (image.num_inference_steps, image.guidance_scale, image.flow_shift) == (50, 4.0, 3.0)
    edge = resolve(GenerationRequest(prompt="a car"), replace(engine.layout, variant="edge"))
    assert (edge.height, edge.width, edge.guidance_scale, edge.flow_shift) == (480, 832, 5.0, 3.0)
