"""The benchmark measures what it claims, with the same weights on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_core.bench import theirs as their_module
from cosmos3_core.bench.__main__ import main
from cosmos3_core.bench.ours import Ours, video_vae
from cosmos3_core.bench.random_models import RANDOM_MODELS
from cosmos3_core.bench.report import Row, format_table
from cosmos3_core.bench.subject import Clip, Subject, Work, checkpoint_subject, random_subject
from cosmos3_core.bench.theirs import Theirs
from cosmos3_core.checkpoint.tensors import transformer_tensors
from cosmos3_core.engine import Engine

CPU = torch.device("cpu")
CLIP = Clip(num_frames=9, height=32, width=48, chunk_latents=1)
WORK = Work(CLIP, text_tokens=12, negative_tokens=7)
STAGES = [
    "prefill, both prompts",
    "step, both branches",
    "decode, first chunk",
    "decode, each later chunk",
    "decode, whole clip",
    "encode of one frame (VAE)",
    "encode of the clip (mp4)",
]
COMPARED = ["step, both branches", "decode, whole clip", "encode of one frame (VAE)"]


def test_both_sides_run_the_same_model(tiny_nano: Path) -> None:
    """Ours and diffusers', as the benchmark builds them, give the same velocities, pixels and latents."""
    for subject in (random_subject("tiny", CPU, torch.float32), checkpoint_subject(tiny_nano, CPU, None)):
        compare(subject)


def compare(subject: Subject) -> None:
    ours, theirs = Ours(subject, WORK), Theirs(subject, WORK)
    vae, latents = video_vae(subject), subject.latents(CLIP)
    pixels = torch.cat(list(vae.decode(latents, chunk_latents=CLIP.chunk_latents)), dim=2)
    assert torch.allclose(pixels, theirs.vae.decode(latents), atol=1e-5)
    frame = torch.rand((1, 3, 1, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(vae.encode(frame), theirs.vae.encode(frame), atol=1e-5)
    assert torch.equal(theirs.vae.encode(frame), theirs._pipeline._encode_video(frame)), "as its pipeline does it"

    # Same seed, and both schedules begin at the timestep 999.
    their_velocities: list[torch.Tensor] = []
    their_transformer = theirs._pipeline.transformer
    their_transformer.register_forward_hook(lambda module, args, out: their_velocities.append(out[0][0].clone()))
    seconds: list[float] = []
    theirs.steps(2, seconds.append)
    assert len(seconds) == 2
    assert min(seconds) > 0
    our_velocities: list[torch.Tensor] = []
    velocity = ours.denoiser.transformer.velocity

    def record(*args: Any) -> dict[str, torch.Tensor]:
        our_velocities.append(velocity(*args)["video"])
        return {"video": our_velocities[-1]}

    ours.denoiser.transformer.velocity = record  # type: ignore[method-assign]
    ours.prefill()
    assert ours.denoiser.text_cache.num_prefills == 2
    ours.start()
    ours.step()
    assert len(our_velocities) == 2
    for mine, other in zip(our_velocities, their_velocities[:2], strict=True):
        assert (mine - other).norm() / other.norm() < 1e-5


def test_a_checkpoint_is_measured_with_its_own_weights(tiny_nano: Path) -> None:
    subject = checkpoint_subject(tiny_nano, CPU, None)
    with Engine(tiny_nano, device="cpu") as engine:
        for (name, theirs), ours in zip(
            engine.denoiser.transformer.named_parameters(),
            Ours(subject, WORK).denoiser.transformer.parameters(),
            strict=True,
        ):
            assert torch.equal(theirs, ours), name


def test_the_random_models_have_the_published_sizes() -> None:
    millions = {
        name: sum(torch.Size(shape).numel() for shape in transformer_tensors(config).values()) / 1e6
        for name, (config, _) in RANDOM_MODELS.items()
    }
    assert {name: round(millions[name], -1) for name in ("nano", "super", "edge")} == {
        "nano": 15170,
        "super": 64020,
        "edge": 3370,
    }


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", "tiny", "--num-frames", "9", "--height", "32", "--width", "32", "--runs", "1"]
    path = tmp_path / "bench.json"
    assert (
        main([*arguments, "--text-tokens", "9", "--negative-tokens", "5", "--device", "cpu", "--json", str(path)]) == 0
    )
    output = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [row["measure"] for row in report["measures"]] == STAGES
    for row in report["measures"]:
        assert row["measure"] in output
        assert row["unit"] == "s"
        assert row["ours"]["median"] > 0
        assert (row["ratio"] is not None) == (row["measure"] in COMPARED)
    assert report["num_frames"] == 9
    assert report["notes"] == []
    assert report["dtype"] == "float32"


def test_one_frame_has_no_line_for_later_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", "tiny", "--num-frames", "1", "--height", "32", "--width", "32", "--runs", "1"]
    assert main([*arguments, "--without-diffusers", "--device", "cpu"]) == 0
    assert "each later chunk" not in capsys.readouterr().out


def test_without_the_reference_it_measures_alone_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(their_module, "VERSION", "0.1")
    arguments = ["--random-weights", "tiny", "--num-frames", "1", "--height", "32", "--width", "32", "--runs", "1"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "Measured alone: diffusers 0.42.1 is installed, 0.1 is compared with." in capsys.readouterr().out
    with pytest.raises(ImportError, match="diffusers 0.42.1 is installed, 0.1 is compared with"):
        Theirs(random_subject("tiny", CPU, torch.float32), WORK)


def test_the_ratio_is_ours_over_theirs() -> None:
    row = Row("step", ours=[1.0, 9.0, 2.0], theirs=[4.0, 4.0])
    assert row.ratio == 0.5
    assert format_table([row], "diffusers").splitlines()[1].split() == [
        "step",
        "s",
        "2.0000",
        "(1.0000-9.0000)",
        "4.0000",
        "(4.0000-4.0000)",
        "0.50",
    ]
    assert Row("prefill", ours=[1.0]).ratio is None


def test_prefill_is_measured_anew_each_time() -> None:
    ours = Ours(random_subject("tiny", CPU, torch.float32), WORK)
    for _ in range(3):
        ours.prefill()
    assert ours.denoiser.text_cache.num_prefills == 6


def test_wrong_flags_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--height", "100"], ["--json", str(tmp_path / "no" / "x.json")]):
        assert main(["--random-weights", "tiny", "--device", "cpu", *flags]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    for flags in ([], ["--runs", "3", "vae", "--random-weights", "tiny"], ["--random-weights", "huge"]):
        with pytest.raises(SystemExit, match="2"):
            main(flags)


def test_chunks_of_several_latents(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", "tiny", "--num-frames", "9", "--height", "32", "--width", "32", "--runs", "1"]
    assert main([*arguments, "--chunk-latents", "4", "--without-diffusers", "--device", "cpu"]) == 0
    assert "each later chunk" not in capsys.readouterr().out


def test_a_bad_checkpoint_is_an_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
