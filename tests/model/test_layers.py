"""The layers by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosmos3_core.model.layers import RMSNorm
from cosmos3_core.ops.registry import Ops


def in_parts(x: Tensor, norm: RMSNorm, *, weight_in_fp32: bool) -> Tensor:
    """The norm spelled out; where the weight comes in is what the two backbones differ in."""
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    if weight_in_fp32:
        return (unit * norm.weight.float()).to(x.dtype)
    return unit.to(x.dtype) * norm.weight


@pytest.mark.parametrize("weight_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_rounds_where_the_backbone_does(dtype: torch.dtype, weight_in_fp32: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(128, 1e-6, Ops(), weight_in_fp32=weight_in_fp32).to(dtype)
    norm.weight.copy_(1 + 0.2 * torch.randn(128, generator=generator))
    x = torch.randn((50, 6, 128), generator=generator).to(dtype)[:, 1:4]  # as heads come: a view
    assert torch.equal(norm(x), in_parts(x, norm, weight_in_fp32=weight_in_fp32))
    # Rounding twice is another thing than rounding once, or the two would need no flag.
    assert not torch.equal(norm(x), in_parts(x, norm, weight_in_fp32=not weight_in_fp32))
