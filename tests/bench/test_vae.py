"""`bench vae`: chunk by chunk beside diffusers' whole clip, and that the former takes less memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cosmos3_core.bench.__main__ import main
from cosmos3_core.bench.flags import BenchModel
from cosmos3_core.bench.peak import peak_growth_bytes
from cosmos3_core.bench.subject import Clip, open_subject
from cosmos3_core.bench.vae import decode_dropping, prepare_decode

TINY = BenchModel(random_weights="tiny")
SHAPE = ["--random-weights", "tiny", "--num-frames", "33", "--height", "64", "--width", "96", "--device", "cpu"]
MEASURES = [
    ("decode, first chunk", "s"),
    ("decode, each later chunk", "s"),
    ("decode, whole clip", "s"),
    ("encode of one frame (VAE)", "s"),
    ("decode, whole clip", "frames/s"),
    ("decode, peak memory", "MB"),
]


def test_the_command_alone_and_the_memory_that_chunks_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vae.json"
    assert main(["vae", *SHAPE, "--runs", "1", "--without-diffusers", "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "Measured alone: diffusers was left out." in output
    report = json.loads(path.read_text())
    assert [(row["measure"], row["unit"]) for row in report["measures"]] == MEASURES
    rows = {(row["measure"], row["unit"]): row for row in report["measures"]}
    assert all(row["ours"]["median"] > 0 and row["theirs"] is None for row in rows.values())
    seconds, speed = (rows["decode, whole clip", unit]["ours"]["median"] for unit in ("s", "frames/s"))
    assert speed == pytest.approx(33 / seconds)
    assert (report["num_frames"], report["chunk_latents"], report["dtype"]) == (33, 1, "float32")

    in_chunks = rows["decode, peak memory", "MB"]["ours"]["median"] * 1e6
    at_once = peak_growth_bytes(prepare_decode, TINY, Clip(33, 64, 96, chunk_latents=8), "ours")
    assert in_chunks < at_once / 2


def test_the_side_by_side_decodes_the_same_pixels() -> None:
    """What memory is measured of: everything loaded, then the whole clip."""
    clip = Clip(9, 32, 48, chunk_latents=1)
    pixels = prepare_decode(TINY, clip, "theirs")()
    assert isinstance(pixels, torch.Tensor)
    subject = open_subject(TINY, torch.device("cpu"))
    kept: list[torch.Tensor] = []

    class Kept:
        def decode(self, latents: torch.Tensor, *, chunk_latents: int) -> list[torch.Tensor]:
            from cosmos3_core.bench.ours import video_vae

            kept.extend(video_vae(subject).decode(latents, chunk_latents=chunk_latents))
            return list(kept)

    decode_dropping(Kept(), clip, subject.latents(clip))  # type: ignore[arg-type]
    assert torch.allclose(torch.cat(kept, dim=2), pixels, atol=1e-5)


@pytest.mark.slow  # diffusers is loaded in a process of its own
def test_beside_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "vae.json"
    assert main(["vae", *SHAPE, "--runs", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = {(row["measure"], row["unit"]): row for row in report["measures"]}
    compared = {key for key, row in rows.items() if row["theirs"] is not None}
    assert compared == set(MEASURES) - {("decode, first chunk", "s"), ("decode, each later chunk", "s")}
    # It keeps the whole clip, as well as what a chunk takes.
    assert rows["decode, peak memory", "MB"]["ratio"] < 1
    assert report["reference"] == "diffusers 0.42.1"


def test_wrong_flags_are_refused_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--height", "100"], ["--dtype", "int8"], ["--num-frames", "100000"]):
        assert main(["vae", *SHAPE, *flags]) == 2
        assert capsys.readouterr().err.startswith("error: ")
