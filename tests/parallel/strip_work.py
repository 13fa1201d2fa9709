"""What rank processes do in the tests of strips: decode and encode clips together. Needs torch, no pytest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.parallel.groups import Groups
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.parallel.strips import PixelSpan, Strip, strip_of
from cosmos3_core.vae.video import VideoVAE
from tests.vae.small_vae import random_latents, random_pixels, small_config

LAYOUTS = [Layout(sp=2), Layout(sp=3), Layout(cfg=2, tp=2)]

# Latent frames, rows, columns; latent frames a chunk. Rows or columns are cut, into equal strips or not, by the number
# of ranks; the last two are too small for some.
CLIPS: dict[str, tuple[tuple[int, int, int], int]] = {
    "one by one": ((3, 5, 3), 1),
    "two by two": ((4, 3, 7), 2),
    "four by four": ((6, 5, 4), 4),
    "one frame": ((1, 4, 6), 1),
    "three rows": ((2, 3, 2), 1),
    "one position": ((3, 1, 1), 2),
}


def small_vae() -> VideoVAE:
    """The same in every process."""
    torch.manual_seed(0)
    vae = VideoVAE(small_config())
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return vae


def clip_pixels(vae: VideoVAE, grid: tuple[int, int, int]) -> Tensor:
    """Pixels that encode to this grid, or its first three frames: encoding knows no chunks of several."""
    num_frames, height, width = grid
    side = vae.geometry.spatial
    return random_pixels(vae.geometry.num_pixel_frames(min(num_frames, 3)), height * side, width * side)


class Apart(Strip):
    """A strip that takes what lies beside it for the frame's edge."""

    def fill_border(self, x_HW: Tensor, *, before: int, after: int) -> None:
        pass


class Alone(Apart):
    """A strip without neighbours, which sees only itself."""

    def gather(self, x_KHWC: Tensor) -> Tensor:
        return x_KHWC


@dataclass(frozen=True)
class ClipResult:
    """The results of one rank.

    Attributes:
        chunks: shapes of its own decoded chunks.
        span: where its pixels belong.
        decoded: whole frames, fp32.
        frames: the same as bytes; on the first rank.
        latents: of the whole frames.
        num_modules: that were seen at work.
        beyond: most rows (columns) that any tensor into or out of a module had beyond the rank's strip at that level.
        decoded_apart, latents_apart: without what lies beside the strip; of two ranks, where the clip is split.
    """

    chunks: list[tuple[int, ...]]
    span: PixelSpan
    decoded: Tensor
    frames: Tensor | None
    latents: Tensor
    num_modules: int
    beyond: int
    decoded_apart: Tensor | None
    latents_apart: Tensor | None


def decode_and_encode(groups: Groups, device: torch.device) -> dict[str, ClipResult]:
    """A rank's work: all of :data:`CLIPS`."""
    vae = small_vae()
    return {name: _one_clip(vae, groups, *clip) for name, clip in CLIPS.items()}


def _one_clip(vae: VideoVAE, groups: Groups, grid: tuple[int, int, int], chunk_latents: int) -> ClipResult:
    strip = strip_of(groups.everyone, *grid[1:])
    latents, pixels = random_latents(grid), clip_pixels(vae, grid)
    with _watch(vae, strip) as seen:
        chunks = list(vae.decode(latents, chunk_latents=chunk_latents, part=strip))
        encoded = vae.encode(pixels, part=strip)
    collected = [strip.collect(to_uint8(chunk)) for chunk in chunks]
    frames = None if collected[0] is None else torch.cat(collected)
    decoded_apart = latents_apart = None
    if strip.axis is not None and strip.ranks.num_ranks == 2:
        apart = Apart(strip.cuts, strip.ranks)
        decoded_apart = torch.cat(
            [strip.share(chunk) for chunk in vae.decode(latents, chunk_latents=chunk_latents, part=apart)], dim=2
        )
        latents_apart = vae.encode(pixels, part=apart)
    return ClipResult(
        [tuple(chunk.shape) for chunk in chunks],
        strip.pixels(vae.geometry.spatial),
        torch.cat([strip.share(chunk) for chunk in chunks], dim=2),
        frames,
        encoded,
        len({module for module, _ in seen}),
        max((beyond for _, beyond in seen), default=0),
        decoded_apart,
        latents_apart,
    )


@contextmanager
def _watch(vae: VideoVAE, strip: Strip) -> Iterator[set[tuple[str, int]]]:
    """(module, rows or columns beyond the strip) of every tensor that goes into or comes out of a module."""
    seen: set[tuple[str, int]] = set()
    start, stop = strip.cuts.span(strip.ranks.rank)
    other = -3 - strip.cuts.axis

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            for x in (output, *args):
                if isinstance(x, Tensor) and x.dim() >= 4:
                    # How fine the level is, by the axis that is not cut; a border of two is less than a latent row.
                    factor = x.shape[other] // strip.cuts.grid_HW[other]
                    seen.add((name, x.shape[strip.cuts.axis] - factor * (stop - start)))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in vae.named_modules()]
    yield seen
    for handle in handles:
        handle.remove()
