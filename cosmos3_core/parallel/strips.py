"""Frames cut into strips of rows or columns, one per rank: the video VAE on several devices, exactly.

Frames are cut between rows or columns of latents, so that a strip is whole at every finer level. At each level the
neighbours provide the borders that a convolution reads beyond its strip; the mid block's attention gathers keys and
values from all ranks.

``_HW`` ends a tensor whose last axes are rows and columns; F/Y/X pixel frames, rows, columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.collectives import all_gather_runs
from cosmos3_core.parallel.groups import RankGroup

_ROWS, _COLUMNS = -2, -1


@dataclass(frozen=True)
class Cuts:
    """The cuts of the frames of one grid of latents.

    Attributes:
        grid_HW: rows and columns of the latents.
        axis: -2 cuts rows, -1 columns.
        edges: strip i has rows (columns) ``edges[i]`` to ``edges[i + 1] - 1``; it is empty if the two edges are equal.
    """

    grid_HW: tuple[int, int]
    axis: int
    edges: tuple[int, ...]

    @property
    def is_split(self) -> bool:
        """Whether several strips hold anything; all of them do then."""
        return len(self.edges) > 2 and self.edges[1] < self.edges[2]

    @property
    def largest_HW(self) -> tuple[int, int]:
        """Rows and columns of the largest strip, which is the first."""
        height, width = self.grid_HW
        return (self.edges[1], width) if self.axis == _ROWS else (height, self.edges[1])

    def span(self, index: int) -> tuple[int, int]:
        """Return the first row (column) of a strip, and the one after its last."""
        return self.edges[index], self.edges[index + 1]


def cut_frame(height: int, width: int, num_strips: int) -> Cuts:
    """Cut a grid of latents so that the largest strip is as small as possible.

    Strips differ by at most one row (column), the larger ones first: 45 rows over 4 are 12, 11, 11, 11. If rows and
    columns give equal strips, the cut with the shorter border is taken, and in a square the rows, which are contiguous
    in memory. An axis with fewer rows (columns) than strips is not cut; if neither has enough, the first strip is the
    whole frame and the others are empty.
    """
    candidates = [
        (-(-num // num_strips) * border, border, axis)
        for num, border, axis in ((height, width, _ROWS), (width, height, _COLUMNS))
        if num >= num_strips
    ]
    if not candidates:
        return Cuts((height, width), _ROWS, (0, *[height] * num_strips))
    _, _, axis = min(candidates)
    share, num_larger = divmod((height, width)[axis], num_strips)
    edges = tuple(index * share + min(index, num_larger) for index in range(num_strips + 1))
    return Cuts((height, width), axis, edges)


class PixelSpan(NamedTuple):
    """The place of a strip in decoded frames [F, Y, X, 3]: from ``start`` to ``stop`` - 1 along ``axis``."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Strip:
    """One rank's strip of the frames of a clip: a :class:`cosmos3_core.vae.frame_part.FramePart`.

    Every rank of the group has a strip of the same cuts and makes the same calls in the same order.

    Attributes:
        cuts: the cuts of the frames.
        ranks: the ranks that hold the strips, in order.
    """

    cuts: Cuts
    ranks: RankGroup

    @property
    def axis(self) -> int | None:
        return self.cuts.axis if self.cuts.is_split else None

    def pixels(self, scale: int) -> PixelSpan:
        """Return the place of this strip's pixels; ``scale`` pixels per latent row or column."""
        start, stop = self.cuts.span(self.ranks.rank)
        return PixelSpan(self.cuts.axis + 3, start * scale, stop * scale)

    def cut(self, x_HW: Tensor, scale: int = 1) -> Tensor:
        self._check_grid(x_HW.shape[-2], x_HW.shape[-1], scale)
        start, stop = self.cuts.span(self.ranks.rank)
        return x_HW.narrow(self.cuts.axis, start * scale, (stop - start) * scale)

    def largest(self, height: int, width: int) -> tuple[int, int]:
        self._check_grid(height, width)
        return self.cuts.largest_HW

    def fill_border(self, x_HW: Tensor, *, before: int, after: int) -> None:
        if not self.cuts.is_split:
            return
        num_own = x_HW.shape[self.cuts.axis] - before - after
        rank, exchanges, arrivals = self.ranks.rank, [], []
        # Each neighbour: its rank, start and number of the rows (columns) that it needs, then of those that it gives.
        for peer, needed, num_needed, given, num_given in (
            (rank - 1, before, after, 0, before),
            (rank + 1, num_own, before, before + num_own, after),
        ):
            if not 0 <= peer < self.ranks.num_ranks:
                continue
            if num_needed:
                sent = x_HW.narrow(self.cuts.axis, needed, num_needed).contiguous()
                exchanges.append(self._exchange(dist.isend, sent, peer))
            if num_given:
                border = x_HW.narrow(self.cuts.axis, given, num_given)
                received = torch.empty_like(border, memory_format=torch.contiguous_format)
                exchanges.append(self._exchange(dist.irecv, received, peer))
                arrivals.append((border, received))
        _complete(exchanges)
        for border, received in arrivals:
            border.copy_(received)

    def gather(self, x_KHWC: Tensor) -> Tensor:
        return self._join(x_KHWC, self.cuts.axis - 1) if self.cuts.is_split else x_KHWC

    def share(self, x_HW: Tensor) -> Tensor:
        return self._join(x_HW, self.cuts.axis) if self.ranks.num_ranks > 1 else x_HW

    def collect(self, frames_FYX3: Tensor) -> Tensor | None:
        """Collect every rank's pixels of some frames on the first rank.

        Args:
            frames_FYX3: this rank's pixels, [F, own Y, own X, 3] of any dtype.

        Returns:
            [F, Y, X, 3] on the first rank, None on the others.
        """
        is_first, axis = self.ranks.rank == 0, self.cuts.axis - 1
        if not self.cuts.is_split:
            return frames_FYX3 if is_first else None
        if not is_first:
            _complete([self._exchange(dist.isend, frames_FYX3.contiguous(), 0)])
            return None
        scale = self._scale(frames_FYX3, axis)
        strips = [frames_FYX3]
        for peer in range(1, self.ranks.num_ranks):
            dims = list(frames_FYX3.shape)
            start, stop = self.cuts.span(peer)
            dims[axis] = (stop - start) * scale
            strips.append(frames_FYX3.new_empty(dims))
        _complete([self._exchange(dist.irecv, strip, peer) for peer, strip in enumerate(strips) if peer])
        return torch.cat(strips, dim=axis)

    def _check_grid(self, height: int, width: int, scale: int = 1) -> None:
        own_height, own_width = self.cuts.grid_HW
        if (height, width) != (own_height * scale, own_width * scale):
            raise RequestError(
                "part",
                f"a strip of {own_height * scale} x {own_width * scale} rows and columns",
                f"one of the clip's {height} x {width}",
                "make the part from the clip's own latent rows and columns",
            )

    def _join(self, x: Tensor, axis: int) -> Tensor:
        """Join every rank's strip along ``axis`` on every rank; shorter ones travel padded."""
        scale, edges = self._scale(x, axis), self.cuts.edges
        own = x.movedim(axis, 0)
        padded = own.new_empty((edges[1] * scale, *own.shape[1:]))
        padded[: own.shape[0]].copy_(own)
        runs = all_gather_runs(padded, self.ranks.num_ranks, self.ranks.group).unflatten(0, (-1, padded.shape[0]))
        counts = [(stop - start) * scale for start, stop in map(self.cuts.span, range(self.ranks.num_ranks))]
        return torch.cat([run[:count].movedim(0, axis) for run, count in zip(runs, counts, strict=True)], dim=axis)

    def _scale(self, x: Tensor, axis: int) -> int:
        """Return the rows (columns) of ``x`` per latent, read from the axis that is not cut: a strip may be empty."""
        other = _ROWS + _COLUMNS - self.cuts.axis
        return x.shape[axis + other - self.cuts.axis] // self.cuts.grid_HW[other]

    def _exchange(self, way: Any, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(way, x, group=self.ranks.group, group_peer=peer)


def strip_of(ranks: RankGroup, height: int, width: int) -> Strip:
    """Return a rank's strip of frames of ``height`` x ``width`` latents; a single rank has all of them."""
    return Strip(cut_frame(height, width, ranks.num_ranks), ranks)


def _complete(exchanges: list[dist.P2POp]) -> None:
    """Start all exchanges as one batch, so that ranks cannot deadlock, and wait for them."""
    for work in dist.batch_isend_irecv(exchanges):
        work.wait()
