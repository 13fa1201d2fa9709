"""Initial noise: one CPU generator, fp32, modalities in a fixed order, so that a seed means the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cosmos3_core.errors import RequestError


def draw_noise(
    seed: int, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Draw standard normal noise per modality, fp32 on the CPU.

    The draws equal diffusers 0.42.1's with a CPU generator of the same seed.

    Args:
        shapes: modality -> shape, in drawing order: video first.
        given: modality -> noise to use instead of a draw.

    Raises:
        RequestError: given noise is for an unknown modality, or has another shape.
    """
    given = dict(given or {})
    unknown = sorted(set(given) - set(shapes))
    if unknown:
        raise RequestError("noise", unknown, f"modalities of this request: {sorted(shapes)}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = {}
    for name, shape in shapes.items():
        if name not in given:
            noise[name] = torch.randn(shape, generator=generator, dtype=torch.float32)
            continue
        if tuple(given[name].shape) != tuple(shape):
            raise RequestError(f"noise.{name}", list(given[name].shape), f"a tensor of shape {list(shape)}")
        noise[name] = given[name].detach().to("cpu", torch.float32)
    return noise
