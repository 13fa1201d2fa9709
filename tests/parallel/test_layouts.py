"""Every layout gives what one rank gives: gloo on the CPU, fp32, real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.layout import Layout, Place
from cosmos3_core.shapes import LatentShape

pytestmark = [pytest.mark.gang, pytest.mark.timeout(600)]

# 3 x 3 x 5 tokens: 45, which 2 does not divide and 3 does; 2 x 2 x 5: 20, which 3 does not.
REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"latent_shape": (3, 5, 9), "guidance_scale": 6.0, "num_inference_steps": 6},
    "unguided": {"latent_shape": (3, 5, 9), "guidance_scale": 1.0, "num_inference_steps": 3},
    "indivisible": {"latent_shape": (2, 4, 10), "guidance_scale": 3.0, "num_inference_steps": 3},
}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 1, 3), (1, 2, 2), (2, 1, 2)]

RANK = """
import json, os, sys
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.parallel.apply import branch_share, parallelize
from cosmos3_core.parallel.groups import close_groups, init_groups
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.shapes import LatentShape

checkpoint, out, degrees, requests = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
layout, rank = Layout(*degrees), int(os.environ["RANK"])
groups = init_groups(layout, rank, backend="gloo", timeout_s=100)
files = CheckpointLayout.open(checkpoint)
transformer = load_transformer(files, device=torch.device("cpu"), shard=layout.shard(rank))
parallelize(transformer, groups)
denoiser = Denoiser(transformer, files.geometry, files.scheduler, branch_share=branch_share(groups))
results = {}
for name, fields in requests.items():
    shape = LatentShape(*fields.pop("latent_shape"))
    request = DenoiseRequest((5, 6, 7, 8), (3, 4), shape, 24.0, schedule="native", flow_shift=10.0, seed=1, **fields)
    for attempt in ("first", "again"):
        latents = denoiser.run(denoiser.prepare(request)).latents["video"]
        results[f"{name}/{attempt}"] = latents.contiguous()
save_file({**results, "prefills": torch.tensor(denoiser.text_cache.num_prefills)}, f"{out}/{rank}.safetensors")
close_groups()
"""


@pytest.fixture(scope="module")
def alone(tiny_nano: Path) -> dict[str, torch.Tensor]:
    files = CheckpointLayout.open(tiny_nano)
    denoiser = Denoiser(load_transformer(files, device=torch.device("cpu")), files.geometry, files.scheduler)
    results = {}
    for name, fields in REQUESTS.items():
        shaped = {**fields, "latent_shape": LatentShape(*fields["latent_shape"])}
        request = DenoiseRequest((5, 6, 7, 8), (3, 4), fps=24.0, schedule="native", flow_shift=10.0, seed=1, **shaped)
        results[name] = denoiser.run(denoiser.prepare(request)).latents["video"]
    return results


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_a_layout_gives_what_one_rank_gives(
    degrees: tuple[int, int, int], alone: dict[str, torch.Tensor], tiny_nano: Path, tmp_path: Path
) -> None:
    import json

    layout = Layout(*degrees)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout.num_ranks}"]
    arguments = [str(script), str(tiny_nano), str(tmp_path), json.dumps(degrees), json.dumps(REQUESTS)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(layout.num_ranks)]

    for name, expected in alone.items():
        for rank, result in enumerate(ranks):
            assert torch.equal(result[f"{name}/first"], result[f"{name}/again"]), "the same layout twice"
            assert torch.equal(result[f"{name}/first"], ranks[0][f"{name}/first"]), f"rank {rank} as rank 0"
        difference = (ranks[0][f"{name}/first"] - expected).norm() / expected.norm()
        assert difference <= 1e-5
        if layout.tp == layout.sp == 1:
            assert difference == 0, "CFG alone changes no arithmetic"
    # Each CFG group prefills its own prompt only; the two prompts are shared by all requests.
    expected_prefills = {(0, 1): 2, (1, 1): 2, (0, 2): 1, (1, 2): 1}
    for rank, result in enumerate(ranks):
        assert int(result["prefills"]) == expected_prefills[layout.place(rank).cfg, layout.cfg]


def test_cfg_is_the_outer_axis_and_tp_the_inner() -> None:
    layout = Layout(tp=4, cfg=2)
    assert [layout.place(rank).cfg for rank in range(8)] == [0] * 4 + [1] * 4
    assert layout.peers("cfg") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    both = Layout(tp=2, cfg=2, sp=3)
    assert both.num_ranks == 12
    assert both.place(7) == Place(cfg=1, sp=0, tp=1)
    for rank in range(12):
        assert both.rank(both.place(rank)) == rank
    for axis in ("tp", "cfg", "sp"):
        assert sorted(rank for ranks in both.peers(axis) for rank in ranks) == list(range(12))
    assert str(both) == "TP2 x CFG2 x SP3"


def test_bad_layouts_are_refused_with_the_valid_choices() -> None:
    with pytest.raises(RequestError, match="cfg=3.*1 or 2"):
        Layout(cfg=3)
    with pytest.raises(RequestError, match="tp=0"):
        Layout(tp=0)
    for tp in (3, 16):
        with pytest.raises(RequestError, match="one of 1, 2, 4, 8"):
            Layout(tp=tp).check(TransformerConfig())
    Layout(tp=8, cfg=2).check(TransformerConfig())


def test_torchrun_writes_one_file_with_the_pictures_of_one_process(tiny_nano: Path, tmp_path: Path) -> None:
    request = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--num-frames", "5", "--height", "48"]
    request += ["--width", "64", "--steps", "3", "--device", "cpu"]
    alone = [sys.executable, "-m", "cosmos3_core.generate", *request, "--out", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, capture_output=True, timeout=200)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = [*torchrun, "-m", "cosmos3_core.generate", *request, "--cfg", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(two, check=True, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("5 frames, 64x48") == 1
    # CFG changes no arithmetic, so not a byte differs.
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()


def test_as_many_processes_as_ranks(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cosmos3_core.generate import main

    arguments = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--device", "cpu"]
    assert main([*arguments, "--tp", "2"]) == 2
    assert "as many ranks as there are processes, 1" in capsys.readouterr().err
    assert main([*arguments, "--cfg", "3"]) == 2
    assert "1 or 2" in capsys.readouterr().err
