"""Random weights for the tensors of a checkpoint, scaled so that the network behaves like a trained one.

Activations keep an ordinary magnitude, every tensor matters to the result, and rounding errors hardly grow. They fill
the tiny checkpoint, and the models of benchmarks.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from cosmos3_core.checkpoint.tensors import Shape


@dataclass(frozen=True)
class Spread:
    """The distribution of one kind of tensor.

    Attributes:
        std: standard deviation; with ``per_input``, of the layer's output for an input of standard deviation 1.
        per_input: divide ``std`` by the square root of the number of inputs, the product of all axes but the first.
    """

    std: float
    mean: float = 0.0
    per_input: bool = False


_SPREADS: tuple[tuple[re.Pattern[str], Spread], ...] = tuple(
    (re.compile(pattern), spread)
    for pattern, spread in (
        # Normalisations: far from constant, so that a forgotten or swapped one shows.
        (r"norm\w*\.weight$|\.gamma$", Spread(0.25, mean=1.0)),
        # A branch is as large as the stream that it joins, so that every layer matters.
        (r"\.to_(add_)?out\.weight$|\.(gate|up)_proj\.weight$", Spread(1.5, per_input=True)),
        # A row is one embodiment's flattened [in, out] matrix: 64 action values in, or 64 out, in published models.
        (r"^action_proj_in\.fc\.weight$", Spread(1 / 8)),
        (r"^action_proj_out\.fc\.weight$", Spread(8.0, per_input=True)),
        (r"_modality_embed$", Spread(0.5)),
        (r"^embed_tokens\.weight$", Spread(1.0)),
        # The last convolutions of the two decoders: almost all pixels and samples are within [-1, 1].
        (r"^decoder\.conv_out\.weight$", Spread(0.45, per_input=True)),
        (r"^decoder\.conv_out\.bias$", Spread(0.05)),
        (r"^decoder\.conv2\.weight_g$", Spread(0.05, mean=0.45)),
        (r"\.bias(\.weight)?$", Spread(0.2)),
        # Weight-normed convolutions and snake activations, which hold logarithms. A magnitude is the layer's gain, and
        # half is as much as the audio decoder bears: at 1 it amplifies rounding errors a hundredfold. In a transposed
        # convolution magnitudes belong to inputs, and 0.8 makes about the same gain of one half.
        (r"\.(alpha|beta)$", Spread(0.3)),
        (r"\.weight_v$", Spread(1.0)),
        (r"\.conv_t1\.weight_g$", Spread(0.1, mean=0.8)),
        (r"^decoder\..*\.weight_g$", Spread(0.1, mean=0.5)),
        (r"\.weight_g$", Spread(0.2, mean=1.0)),
        (r"", Spread(1.0, per_input=True)),
    )
)


def random_tensors(
    shapes: Mapping[str, Shape],
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Draw the tensors of ``shapes`` one after another, as (name, tensor).

    Each tensor has a generator of its own, keyed by seed and name, so that adding or removing tensors changes no other.
    Draws are uniform, which needs no mathematics that processors round differently: all CPUs draw the same bits.

    Args:
        shapes: names and shapes as in :mod:`cosmos3_core.checkpoint.tensors`.
        dtype: dtype of the result; the draw is in float32.
        device: device that draws; other kinds of device draw other numbers.
    """
    for name, shape in shapes.items():
        spread = next(spread for pattern, spread in _SPREADS if pattern.search(name))
        std = spread.std / math.sqrt(math.prod(shape[1:])) if spread.per_input else spread.std
        generator = torch.Generator(device).manual_seed(_tensor_seed(seed, name))
        tensor = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
        # Uniform on [0, 1) has variance 1/12.
        yield name, tensor.sub_(0.5).mul_(std * math.sqrt(12.0)).add_(spread.mean).to(dtype)


def _tensor_seed(seed: int, name: str) -> int:
    # Four bytes: torch's CPU generator reads no more.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
