"""The checks of ``python -m tests.gpu``: on GPUs where there are any, and on gloo so that they are known to work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos3_core.parallel.layout import Layout
from tests.gpu import split_decode
from tests.gpu.__main__ import main
from tests.gpu.layouts import DTYPES, LAYOUTS, check_layouts, compare
from tests.gpu.strips import check_strips
from tests.gpu.verdict import run_check
from tests.gpu.video_vae import check_video_vae
from tests.parallel.gang_work import RESULTS

pytestmark = pytest.mark.timeout(600)


def needs_gpus(num_devices: int) -> None:
    if (available := torch.cuda.device_count()) < num_devices:
        pytest.skip(f"needs {num_devices} GPUs, there are {available}")


@pytest.mark.gpu
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_layouts_over_nccl(num_devices: int, tiny_nano: Path) -> None:
    needs_gpus(num_devices)
    layouts = [layout for layout in LAYOUTS if layout.num_ranks == num_devices]
    failed = [verdict for verdict in check_layouts(tiny_nano, "cuda", num_devices, layouts) if verdict.status != "ok"]
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.gpu
def test_strips_over_nccl(tiny_nano: Path) -> None:
    needs_gpus(2)
    failed = [
        verdict for verdict in check_strips(tiny_nano, "cuda", torch.cuda.device_count()) if verdict.status != "ok"
    ]
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.gpu
def test_the_video_vae_on_a_gpu(tiny_nano: Path) -> None:
    needs_gpus(1)
    failed = [verdict for verdict in check_video_vae(tiny_nano, "cuda") if verdict.status != "ok"]
    assert not failed, "\n".join(map(str, failed))


def run_app_check(*arguments: str) -> None:
    """Run the check in its own process, away from the tests' Ray."""
    command = [sys.executable, "-m", "tests.gpu", "--only", "app", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "5 frames, 96x64, 24 fps" in done.stdout


@pytest.mark.gpu
@pytest.mark.cluster
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_app_on_gpus(num_devices: int) -> None:
    needs_gpus(num_devices)
    run_app_check("--num-devices", str(num_devices))


@pytest.mark.slow
@pytest.mark.cluster
def test_the_app_check_on_the_cpu() -> None:
    run_app_check("--device", "cpu", "--num-devices", "2")


@pytest.mark.slow
@pytest.mark.gang
def test_the_layout_check_on_gloo(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--num-devices", "2", "--only", "layouts", "--checkpoint", str(tiny_nano)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("needs 4 devices, there are 2" in line for line in lines) == 5 * len(DTYPES)
    assert lines[-1] == "0 FAIL, 9 ok, 12 skip, on 2 x cpu"


@pytest.mark.slow
@pytest.mark.gang
def test_all_three_degrees_at_once(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--num-devices", "8", "--only", "layouts", "--checkpoint", str(tiny_nano)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("TP2 x CFG2 x SP2" in line and line.startswith("ok") for line in lines) == len(DTYPES)
    assert lines[-1] == "0 FAIL, 21 ok, 0 skip, on 8 x cpu"


@pytest.mark.slow
def test_the_check_of_modes_on_the_cpu(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--only", "modes", "--checkpoint", str(tiny_nano)]) == 0
    assert capsys.readouterr().out.endswith("0 FAIL, 20 ok, 0 skip, on 2 x cpu\n")


def test_the_check_of_the_video_vae_on_the_cpu(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--only", "video-vae", "--checkpoint", str(tiny_nano)]) == 0
    assert capsys.readouterr().out.endswith("0 FAIL, 3 ok, 0 skip, on 2 x cpu\n")


@pytest.mark.slow
@pytest.mark.gang
def test_the_check_of_strips_on_gloo(tiny_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--num-devices", "3", "--only", "strips", "--checkpoint", str(tiny_nano)]) == 0
    assert capsys.readouterr().out.endswith("0 FAIL, 2 ok, 0 skip, on 3 x cpu\n")


def test_strips_of_one_device_are_not_checked(tmp_path: Path) -> None:
    assert [verdict.status for verdict in check_strips(tmp_path, "cpu", 1)] == ["skip", "skip"]


@pytest.mark.slow
@pytest.mark.gang
def test_the_times_of_split_decode_on_gloo(capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--num-frames", "5", "--height", "48", "--width", "64", "--model", "tiny", "--runs", "1"]
    assert split_decode.main(["--device", "cpu", "--num-devices", "2", *clip]) == 0
    ways = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("one,", "all,"))]
    assert len(ways) == 3
    assert split_decode.main(["--device", "cpu", "--num-devices", "1", *clip]) == 2


def test_the_operator_check_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--only", "operators"]) == 0
    assert capsys.readouterr().out.endswith("0 FAIL, 3 ok, 11 skip, on 2 x cpu\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_differences_beyond_the_tolerance_and_errors_fail() -> None:
    torch.manual_seed(0)
    exact = torch.randn(1000)

    def rank(fp32: torch.Tensor, bf16: torch.Tensor) -> dict[torch.dtype, dict[str, torch.Tensor]]:
        both = {torch.float32: fp32, torch.bfloat16: bf16}
        return {
            dtype: {f"{name}/{run}": x for name in RESULTS for run in ("first", "again")} for dtype, x in both.items()
        }

    alone = rank(exact, exact * 1.01)
    near, far = rank(exact * (1 + 5e-5), exact), rank(exact * (1 + 2e-4), exact * 1.04)
    for dtype in DTYPES:
        assert compare(Layout(tp=2), [near, near], alone, dtype)[0] == ""
        assert "allowed" in compare(Layout(tp=2), [far, far], alone, dtype)[0]
        assert "allowed 0.0e+00" in compare(Layout(cfg=2), [near, near], alone, dtype)[0]
        assert "ranks or runs differ" in compare(Layout(tp=2), [near, far], alone, dtype)[0]

    def fail() -> str:
        raise ValueError("why")

    verdict = run_check("name", fail)
    assert (verdict.status, verdict.detail) == ("FAIL", "ValueError: why")
