"""Frames in strips: the arithmetic of cutting, and decode and encode over ranks against the whole, on gloo in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_core.errors import RequestError
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.parallel.groups import RankGroup, close_groups, init_group
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.parallel.strips import PixelSpan, cut_frame, strip_of
from cosmos3_core.vae.frame_part import WHOLE
from cosmos3_core.vae.video import VideoVAE
from tests.parallel.strip_work import CLIPS, LAYOUTS, Alone, ClipResult, clip_pixels, decode_and_encode, small_vae
from tests.ranks import run_layouts
from tests.vae.small_vae import random_latents

TOLERANCE = 1e-5
MAX_OFF_BY_ONE = 1e-3

EVERYWHERE = [(layout, name) for layout in LAYOUTS for name in CLIPS]
ROWS, COLUMNS = -2, -1


class Clip(NamedTuple):
    """What the whole clip comes to, one latent frame at a time."""

    decoded: Tensor
    frames: Tensor
    latents: Tensor


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return small_vae()


@pytest.fixture(scope="module")
def clips(vae: VideoVAE) -> dict[str, Clip]:
    results = {}
    for name, (grid, _) in CLIPS.items():
        decoded = torch.cat(list(vae.decode(random_latents(grid), chunk_latents=1)), dim=2)
        results[name] = Clip(decoded, to_uint8(decoded), vae.encode(clip_pixels(vae, grid)))
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[Layout, list[dict[str, ClipResult]]]:
    return dict(zip(LAYOUTS, run_layouts(decode_and_encode, LAYOUTS), strict=True))


Results = dict[Layout, list[dict[str, ClipResult]]]


# Over ranks


@pytest.mark.gang
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "name"), EVERYWHERE, ids=str)
def test_strips_decode_to_what_the_whole_does(
    layout: Layout, name: str, ranks: Results, clips: dict[str, Clip]
) -> None:
    results, expected = [rank[name] for rank in ranks[layout]], clips[name]
    assert expected.decoded.std() > 0.05, "an image this flat would prove little"
    for result in results:
        assert torch.equal(result.decoded, results[0].decoded)
    torch.testing.assert_close(results[0].decoded, expected.decoded, rtol=0, atol=TOLERANCE)
    assert [result.frames is None for result in results] == [False] + [True] * (layout.num_ranks - 1)
    difference = (results[0].frames.int() - expected.frames.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= MAX_OFF_BY_ONE


@pytest.mark.gang
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "name"), EVERYWHERE, ids=str)
def test_strips_encode_to_what_the_whole_does(
    layout: Layout, name: str, ranks: Results, clips: dict[str, Clip]
) -> None:
    results = [rank[name] for rank in ranks[layout]]
    for result in results:
        assert torch.equal(result.latents, results[0].latents), "ranks go on from the same latents"
    torch.testing.assert_close(results[0].latents, clips[name].latents, rtol=0, atol=TOLERANCE)


@pytest.mark.gang
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "name"), EVERYWHERE, ids=str)
def test_no_rank_holds_more_than_its_strip_and_a_border(
    layout: Layout, name: str, ranks: Results, vae: VideoVAE
) -> None:
    (num_frames, height, width), chunk_latents = CLIPS[name]
    cuts = cut_frame(height, width, layout.num_ranks)
    # Modules at work: all but lists, and parts of none.
    alone = {key for key, module in vae.named_modules() if not isinstance(module, torch.nn.ModuleList)} - {""}
    for rank, result in enumerate(one[name] for one in ranks[layout]):
        start, stop = cuts.span(rank)
        assert result.span == PixelSpan(cuts.axis + 3, 16 * start, 16 * stop)
        extent = [16 * height, 16 * width]
        extent[cuts.axis] = 16 * (stop - start)
        frames = [1] + [4 * min(chunk_latents, num_frames - first) for first in range(1, num_frames, chunk_latents)]
        assert result.chunks == [(1, 3, count, *extent) for count in frames], "as many chunks everywhere"
        if start == stop:
            assert result.num_modules == 0
        elif min(height, width) > 2:  # else a border is as wide as what it is counted in
            assert result.num_modules == len(alone) - len(_find_unused(vae, num_frames))
            assert result.beyond == 2


def _find_unused(vae: VideoVAE, num_frames: int) -> list[str]:
    """Modules that no forward pass goes through: they hold a gain for an operator, or work on later frames only."""
    unused = [name for name, module in vae.named_modules() if "norm" in name and "attentions" not in name]
    return unused + [name for name, _ in vae.named_modules() if num_frames == 1 and name.endswith("time_conv")]


@pytest.mark.gang
@pytest.mark.timeout(300)
def test_without_the_neighbours_rows_it_would_show(ranks: Results, clips: dict[str, Clip]) -> None:
    first = ranks[Layout(sp=2)][0]
    split = [name for name, (grid, _) in CLIPS.items() if max(grid[1:]) > 1]
    assert len(split) == len(CLIPS) - 1
    for name in split:
        assert (first[name].decoded_apart - clips[name].decoded).abs().max() > 1000 * TOLERANCE
        assert (first[name].latents_apart - clips[name].latents).abs().max() > 1000 * TOLERANCE


# Arithmetic


@pytest.mark.parametrize(
    ("grid", "num_strips", "axis", "edges"),
    [
        ((45, 80), 1, COLUMNS, (0, 80)),
        ((45, 80), 2, COLUMNS, (0, 40, 80)),
        ((45, 80), 4, COLUMNS, (0, 20, 40, 60, 80)),
        ((80, 45), 4, ROWS, (0, 20, 40, 60, 80)),
        ((43, 61), 4, ROWS, (0, 11, 22, 33, 43)),
        ((45, 3), 4, ROWS, (0, 12, 23, 34, 45)),
        ((4, 8), 4, COLUMNS, (0, 2, 4, 6, 8)),
        ((8, 4), 4, ROWS, (0, 2, 4, 6, 8)),
        ((6, 6), 3, ROWS, (0, 2, 4, 6)),
        ((3, 5), 4, COLUMNS, (0, 2, 3, 4, 5)),
        ((3, 2), 4, ROWS, (0, 3, 3, 3, 3)),
        ((1, 1), 2, ROWS, (0, 1, 1)),
    ],
)
def test_where_frames_are_cut(grid: tuple[int, int], num_strips: int, axis: int, edges: tuple[int, ...]) -> None:
    cuts = cut_frame(*grid, num_strips)
    assert (cuts.axis, cuts.edges) == (axis, edges)
    assert cuts.is_split == (num_strips > 1 and max(grid) >= num_strips)
    expected = list(grid)
    expected[axis] = max(stop - start for start, stop in map(cuts.span, range(num_strips)))
    assert cuts.largest_HW == tuple(expected)


@pytest.mark.parametrize("num_strips", range(1, 9))
def test_strips_are_the_whole_and_none_is_empty(num_strips: int) -> None:
    for height in range(1, 20):
        for width in range(1, 20):
            cuts = cut_frame(height, width, num_strips)
            counts = [stop - start for start, stop in map(cuts.span, range(num_strips))]
            assert sum(counts) == (height, width)[cuts.axis]
            if max(height, width) < num_strips:
                assert counts == [height] + [0] * (num_strips - 1)
            else:
                assert counts == sorted(counts, reverse=True)
                assert 1 <= counts[-1] <= counts[0] <= counts[-1] + 1


def test_one_rank_has_the_whole_frame_to_the_bit(vae: VideoVAE, clips: dict[str, Clip]) -> None:
    grid, _ = CLIPS["one by one"]
    strip = strip_of(RankGroup(), *grid[1:])
    assert strip.axis is None
    chunks = list(vae.decode(random_latents(grid), part=strip))
    assert torch.equal(torch.cat([strip.share(chunk) for chunk in chunks], dim=2), clips["one by one"].decoded)
    assert torch.equal(vae.encode(clip_pixels(vae, grid), part=strip), clips["one by one"].latents)
    assert strip.collect(frames := to_uint8(chunks[0])) is frames


def test_a_strip_of_other_frames_is_refused_at_the_call(vae: VideoVAE) -> None:
    strip = strip_of(RankGroup(1, 2), 4, 6)
    with pytest.raises(RequestError, match="the clip's 4 x 5 .*a strip of 4 x 6 rows and columns"):
        vae.decode(random_latents((2, 4, 5)), part=strip)
    with pytest.raises(RequestError, match="the clip's 6 x 4 .*a strip of 4 x 6 rows and columns"):
        strip.largest(6, 4)
    with pytest.raises(RequestError, match="the clip's 64 x 80 .*a strip of 64 x 96 rows and columns"):
        vae.encode(clip_pixels(vae, (1, 4, 5)), part=strip)


def test_every_rank_sizes_chunks_by_the_largest_strip(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip fills a device less than a frame does. Rank 3's own is empty here, which must not matter."""
    asked: list[bool] = []

    def latents_to_fill(device: torch.device, *, is_split: bool) -> int:
        asked.append(is_split)
        return 18

    monkeypatch.setattr("cosmos3_core.vae.video.latents_to_fill", latents_to_fill)
    chunks = list(vae.decode(random_latents((6, 2, 3)), part=strip_of(RankGroup(3, 4), 2, 3)))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, frames, 0, 48) for frames in (1, 12, 8)]
    assert asked == [False]
    alone = Alone(cut_frame(5, 3, 4), RankGroup(3, 4))
    chunks = list(vae.decode(random_latents((6, 5, 3)), part=alone))
    # 18 positions are three frames of the largest strip, 2 x 3; of its own, 1 x 3, they would be six, of the whole two.
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, frames, 16, 48) for frames in (1, 12, 8)]
    assert asked == [False, True]
    assert strip_of(RankGroup(3, 4), 45, 80).largest(45, 80) == (45, 20)
    assert WHOLE.largest(45, 80) == (45, 80)


def test_a_gang_without_layout(vae: VideoVAE) -> None:
    ranks = init_group(1, 0, torch.device("cpu"), timeout_s=30.0, store=dist.HashStore())
    assert replace(ranks, group=None) == RankGroup(0, 1)
    assert dist.get_backend(ranks.group) == "gloo"
    close_groups()
    assert not dist.is_initialized()
