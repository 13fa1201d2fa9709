"""Every layout gives what one rank gives: gloo on the CPU, fp32, real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import main
from cosmos3_core.media.image import write_image
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.source import pack_video, read_clip
from cosmos3_core.parallel.layout import Layout, RankCoordinates
from tests.parallel.gang_work import (
    LAYOUTS,
    REQUESTS,
    RESULTS,
    TWICE,
    RankResult,
    is_request_kept_to_the_bit,
    modalities,
    small_request,
)

pytestmark = [pytest.mark.gang, pytest.mark.timeout(600)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_equals_one_rank(layout: Layout, ranks: dict[Layout, list[RankResult]]) -> None:
    alone, results = ranks[Layout()][0].latents, [rank.latents for rank in ranks[layout]]
    assert len(results) == layout.num_ranks
    again = [name for name in RESULTS if name.rsplit("/", 1)[0] in TWICE]
    assert set(alone) == {*(f"{name}/first" for name in RESULTS), *(f"{name}/again" for name in again), "prefills"}
    for name in RESULTS:
        expected = alone[f"{name}/first"]
        for rank, result in enumerate(results):
            if name in again:
                assert torch.equal(result[f"{name}/first"], result[f"{name}/again"]), "the same layout twice"
            assert torch.equal(result[f"{name}/first"], results[0][f"{name}/first"]), f"rank {rank} as rank 0"
        difference = (results[0][f"{name}/first"] - expected).norm() / expected.norm()
        assert difference <= 1e-5
        if layout.tp == layout.sp == 1:
            assert difference == 0, "CFG alone changes no arithmetic"
        fields = REQUESTS[name.rsplit("/", 1)[0]]
        if layout.tp == 1 and is_request_kept_to_the_bit(fields, layout):
            assert difference == 0, "SP keeps every sum whole"
    # Each CFG group prefills its own prompt only; the two prompts are shared by all requests.
    expected_prefills = {(0, 1): 2, (1, 1): 2, (0, 2): 1, (1, 2): 1}
    for rank, result in enumerate(results):
        assert int(result["prefills"]) == expected_prefills[layout.place(rank).cfg, layout.cfg]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_guidance_the_second_group_idles_and_one_rank_warns_once_a_kind(
    layout: Layout, ranks: dict[Layout, list[RankResult]]
) -> None:
    for rank, result in enumerate(ranks[layout]):
        waits = layout.place(rank).cfg == 1
        assert (result.unguided.products == {}) == waits
        assert (result.unguided.queries == {}) == waits
        kinds = ["a video", "an image"] if layout.cfg == 2 and rank == 0 else []
        assert [re.search("guidance is off in a request for (.+?):", text)[1] for text in result.warnings] == kinds


def test_one_rank_without_groups_equals_the_engine(ranks: dict[Layout, list[RankResult]], tiny_nano: Path) -> None:
    """What layouts are compared with is the plain path: nothing put into the model, no process group."""
    files = CheckpointLayout.open(tiny_nano)
    denoiser = Denoiser(load_transformer(files, device=torch.device("cpu")), files.geometry, files.scheduler)
    for name, fields in REQUESTS.items():
        latents = denoiser.run(denoiser.prepare(small_request(fields))).latents
        assert list(latents) == modalities(fields)
        for modality, latent in latents.items():
            assert torch.equal(latent, ranks[Layout()][0].latents[f"{name}/{modality}/first"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_given_frames_and_actions_stay_to_the_bit_on_every_rank(
    layout: Layout, ranks: dict[Layout, list[RankResult]]
) -> None:
    for name, fields in REQUESTS.items():
        request = small_request(fields)
        for rank in ranks[layout]:
            video = rank.latents[f"{name}/video/first"]
            if request.clean_latents is not None:
                assert torch.equal(video[:, :, list(request.clean_frames)], request.clean_latents)
            if request.action is not None:
                actions = rank.latents[f"{name}/action/first"]
                assert not actions[:, request.action.width :].any()
                if request.action.given is not None:
                    assert torch.equal(actions[:, : request.action.width], torch.tensor(request.action.given))


def test_cfg_is_the_outer_axis_and_tp_the_inner() -> None:
    layout = Layout(tp=4, cfg=2)
    assert [layout.place(rank).cfg for rank in range(8)] == [0] * 4 + [1] * 4
    assert layout.peers("cfg") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    both = Layout(tp=2, cfg=2, sp=3)
    assert both.num_ranks == 12
    assert both.place(7) == RankCoordinates(cfg=1, sp=0, tp=1)
    for rank in range(12):
        assert both.rank(both.place(rank)) == rank
    for axis in ("tp", "cfg", "sp"):
        assert sorted(rank for ranks in both.peers(axis) for rank in ranks) == list(range(12))
    assert str(both) == "TP2 x CFG2 x SP3"


def test_bad_layouts_are_refused_with_the_valid_choices() -> None:
    with pytest.raises(RequestError, match="cfg must be 1 or 2 .got 3"):
        Layout(cfg=3)
    with pytest.raises(RequestError, match="tp must be .*got 0"):
        Layout(tp=0)
    for tp in (3, 16):
        with pytest.raises(RequestError, match="one of 1, 2, 4, 8"):
            Layout(tp=tp).check(TransformerConfig())
    Layout(tp=8, cfg=2).check(TransformerConfig())


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [("2", ["--cfg", "2"]), pytest.param("4", ["--cfg", "2", "--sp", "2"], marks=pytest.mark.slow)],
)
def test_torchrun_writes_one_file_with_the_pictures_of_one_process(
    num_ranks: str, layout: list[str], tiny_nano: Path, tmp_path: Path
) -> None:
    """The request has an image: ranks share encoding and decoding too, and the first one writes."""
    image = tmp_path / "given.png"
    write_image(image, np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8), "png")
    request = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--num-frames", "5", "--height", "48"]
    request += ["--width", "64", "--steps", "2", "--device", "cpu", "--image", str(image), "--crf", "0", "--out"]

    def frames_in(directory: Path) -> Frames:
        assert [path.name for path in directory.iterdir()] == ["clip.mp4"]
        return read_clip("clip", pack_video("clip", directory / "clip.mp4"), num_frames=5, keep="first").astype(int)

    for name in ("alone", "ranks"):
        (tmp_path / name).mkdir()
    assert main([*request, str(tmp_path / "alone" / "clip")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    command = [*torchrun, "-m", "cosmos3_core.generate", *layout, *request, str(tmp_path / "ranks" / "clip")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("5 frames, 64x48") == 1

    alone = frames_in(tmp_path / "alone")
    assert alone.std() > 5, "pictures this flat would prove little"
    # Of bytes that went to the encoder at most one in a thousand is off by one; what is compared is RGB again after a
    # lossless file's YUV, where one byte is several.
    difference = abs(frames_in(tmp_path / "ranks") - alone)
    assert difference.max() <= 2
    assert (difference > 0).mean() <= 1e-2


def test_as_many_processes_as_ranks(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--device", "cpu"]
    assert main([*arguments, "--tp", "2"]) == 2
    assert "as many ranks as there are processes, 1" in capsys.readouterr().err
    assert main([*arguments, "--cfg", "3"]) == 2
    assert "1 or 2" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_with_another_number_of_processes_says_so_once(tiny_nano: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    request = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--tp", "2", "--cfg", "2", "--device", "cpu"]
    command = [*torchrun, "-m", "cosmos3_core.generate", *request, "--out", str(tmp_path / "clip")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if "error: " in line and "ranks" in line)
    assert "TP2 x CFG2 x SP1, 4 ranks" in line
    assert "as many ranks as there are processes, 2" in line
    assert "torchrun --nproc_per_node=4" in line
    assert done.stderr.count("Traceback") == 1, "torchrun's own, of the failure as a whole"
    assert list(tmp_path.iterdir()) == []
