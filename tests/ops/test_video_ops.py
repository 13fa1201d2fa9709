"""The video VAE's operators: the kernels against their eager twins, and which are chosen."""

from __future__ import annotations

import logging

import pytest
import torch

from cosmos3_core.ops.video import IMPLEMENTATIONS, VideoOps, select_video_ops
from tests.ops.video_comparison import CASES, TOLERANCES, Case, largest_difference


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), TOLERANCES, ids=str)
def test_a_kernel_equals_eager(name: str, dtype: torch.dtype, case: Case) -> None:
    assert largest_difference(name, dtype, torch.device("cuda"), case) <= TOLERANCES[name, dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_comparison_runs_here_too(case: Case) -> None:
    assert largest_difference("eager", torch.float32, torch.device("cpu"), case) == 0


def test_every_implementation_has_a_tolerance() -> None:
    assert set(IMPLEMENTATIONS) - {"eager"} == {name for name, _ in TOLERANCES}


def test_the_cpu_runs_eager_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cosmos3_core.ops.video"):
        assert select_video_ops(torch.device("cpu")) == VideoOps()
    assert "video VAE ops: eager (no Triton kernels on cpu)" in caplog.text
