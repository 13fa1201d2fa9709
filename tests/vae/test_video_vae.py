"""The video VAE against diffusers' AutoencoderKLWan, and its own promises: lazy, stateless, bounded in memory.

``reference_decode`` and ``reference_encode`` apply the latents' statistics as the diffusers pipeline does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cosmos3_core import shapes
from cosmos3_core.checkpoint.configs import VideoVAEConfig
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.ops.video import VideoOps
from cosmos3_core.vae.video import VideoVAE, patchify, unpatchify
from cosmos3_core.vae.video_blocks import CausalConv3d, FrameCache
from cosmos3_core.vae.video_resample import DuplicateUp
from tests.live_bytes import peak_bytes
from tests.vae.small_vae import random_latents, random_pixels, small_config

# Latent (frames, rows, columns): odd and even, one frame (an image), two, and more than a chunk of four.
GRIDS = [(3, 5, 4), (1, 4, 4), (2, 1, 1), (5, 3, 5), (6, 2, 3)]


def diffusers_vae(config: VideoVAEConfig) -> AutoencoderKLWan:
    # diffusers concatenates some of these, as its JSON has them: lists.
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(config).items()}
    return AutoencoderKLWan(**fields).eval()


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = diffusers_vae(small_config())
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae


@pytest.fixture
def vae(reference: AutoencoderKLWan) -> VideoVAE:
    """A VAE with the reference's weights, loaded name by name; a fresh one, so that tests may hook or change it."""
    vae = VideoVAE(small_config())
    vae.load_state_dict(reference.state_dict(), strict=True)
    return vae


def statistics(reference: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(reference.config.latents_mean, dtype=reference.dtype)
    inverse_std = 1.0 / torch.tensor(reference.config.latents_std, dtype=reference.dtype)
    return mean.view(shape), inverse_std.view(shape)


@torch.no_grad()
def reference_decode(reference: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Its first convolution, a 1x1x1, goes frame by frame as ours does: it rounds otherwise with more of them."""
    mean, inverse_std = statistics(reference)
    conv = reference.post_quant_conv
    by_frame = partial(_frame_by_frame, partial(type(conv).forward, conv))
    with mock.patch.object(conv, "forward", by_frame):
        return reference.decode(latents.to(reference.dtype) / inverse_std + mean).sample


def _frame_by_frame(conv: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    return torch.cat([conv(x_BC1HW) for x_BC1HW in x_BCTHW.split(1, dim=2)], dim=2)


@torch.no_grad()
def reference_encode(reference: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    mean, inverse_std = statistics(reference)
    return (reference.encode(pixels.to(reference.dtype)).latent_dist.mode() - mean) * inverse_std


def whole(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


# Against diffusers


@pytest.mark.parametrize("grid", GRIDS)
def test_decode_equals_diffusers_to_the_bit(vae: VideoVAE, reference: AutoencoderKLWan, grid: tuple[int, ...]) -> None:
    latents = random_latents(grid)
    expected = reference_decode(reference, latents)
    assert expected.std() > 0.05, "an image this flat would prove little"
    assert torch.equal(whole(vae.decode(latents)), expected)


def test_a_batch_decodes_and_encodes_like_diffusers(vae: VideoVAE, reference: AutoencoderKLWan) -> None:
    latents, pixels = random_latents((2, 3, 2), batch=2), random_pixels(5, 32, 48, batch=2)
    assert torch.equal(whole(vae.decode(latents)), reference_decode(reference, latents))
    assert torch.equal(vae.encode(pixels), reference_encode(reference, pixels))


@pytest.mark.parametrize("chunk_latents", [2, 3, 4, 100])
@pytest.mark.parametrize("grid", [(3, 5, 4), (1, 4, 4), (6, 2, 3)])
def test_larger_chunks_round_otherwise_and_no_more(vae: VideoVAE, grid: tuple[int, ...], chunk_latents: int) -> None:
    latents = random_latents(grid)
    one_by_one = whole(vae.decode(latents))
    torch.testing.assert_close(whole(vae.decode(latents, chunk_latents=chunk_latents)), one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_encode_equals_diffusers_to_the_bit(
    vae: VideoVAE, reference: AutoencoderKLWan, grid: tuple[int, int, int]
) -> None:
    pixels = random_pixels(vae.geometry.num_pixel_frames(grid[0]), 16 * grid[1], 16 * grid[2])
    latents = vae.encode(pixels)
    assert latents.shape == (1, 48, *grid)
    assert torch.equal(latents, reference_encode(reference, pixels))


def test_bfloat16_rounds_where_diffusers_does(vae: VideoVAE, reference: AutoencoderKLWan) -> None:
    latents, pixels = random_latents((3, 3, 2)), random_pixels(5, 32, 48)
    half = diffusers_vae(small_config()).to(torch.bfloat16)
    half.load_state_dict(reference.state_dict())
    vae = vae.bfloat16()
    decoded, encoded = whole(vae.decode(latents)), vae.encode(pixels)
    assert decoded.dtype == encoded.dtype == torch.bfloat16
    # Half a percent of the range is less than the rounding of a single bf16 layer moves things.
    torch.testing.assert_close(decoded, reference_decode(half, latents), rtol=0, atol=5e-3)
    torch.testing.assert_close(encoded, reference_encode(half, pixels), rtol=0, atol=5e-3)


@pytest.mark.parametrize("with_encoder", [True, False])
def test_parameters_are_the_published_tensors(with_encoder: bool) -> None:
    """The full-size model, on meta: names, shapes and their order."""
    with torch.device("meta"):
        published = diffusers_vae(VideoVAEConfig()).state_dict()
        vae = VideoVAE(VideoVAEConfig(), with_encoder=with_encoder)
    assert len(published) == 196
    decoding = ("decoder.", "post_quant_conv.")
    expected = [(name, x.shape) for name, x in published.items() if with_encoder or name.startswith(decoding)]
    assert [(name, x.shape) for name, x in vae.state_dict().items()] == expected
    assert all(parameter.is_meta for parameter in vae.parameters())
    assert not list(vae.buffers())


def test_weights_may_be_channels_last(vae: VideoVAE, reference: AutoencoderKLWan) -> None:
    """GPUs want them so; the windows follow, or every convolution would convert its input."""
    vae.use_channels_last()
    seen: list[bool] = []
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.num_history:
            module.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last_3d))
            )
    latents = random_latents((3, 3, 2))
    decoded = whole(vae.decode(latents))
    assert seen
    assert all(seen)
    torch.testing.assert_close(decoded, reference_decode(reference, latents), rtol=0, atol=1e-5)


# A stream, not a tensor


def count_calls(module: torch.nn.Module) -> list[int]:
    """Grows by the number of frames at each call of ``module``."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[2]))
    return calls


@pytest.mark.parametrize(
    ("chunk_latents", "latents_per_chunk", "frames_per_chunk"),
    [(1, [1, 1, 1, 1, 1, 1], [1, 4, 4, 4, 4, 4]), (2, [1, 2, 2, 1], [1, 8, 8, 4]), (9, [1, 5], [1, 20])],
)
def test_a_chunk_is_computed_when_it_is_asked_for(
    vae: VideoVAE, chunk_latents: int, latents_per_chunk: list[int], frames_per_chunk: list[int]
) -> None:
    calls, input_calls = count_calls(vae.decoder), count_calls(vae.post_quant_conv)
    chunks = vae.decode(random_latents((6, 2, 1)), chunk_latents=chunk_latents)
    assert calls == input_calls == []
    for index, num_frames in enumerate(frames_per_chunk):
        assert next(chunks).shape == (1, 3, num_frames, 32, 16)
        assert calls == latents_per_chunk[: index + 1]
        # This one rounds otherwise with its number of frames, so it must not see the chunks.
        assert input_calls == [1] * sum(calls)
    assert next(chunks, None) is None


@pytest.mark.parametrize(
    ("grid", "at_least", "chunk_latents"),
    [((12, 20), 960, 4), ((16, 30), 960, 2), ((16, 31), 960, 2), ((30, 52), 960, 1), ((1, 1), 960, 4), ((1, 1), 1, 1)],
)
def test_small_frames_come_several_at_a_time(grid: tuple[int, int], at_least: int, chunk_latents: int) -> None:
    assert shapes.chunk_latents(*grid, at_least) == chunk_latents


def test_the_size_of_the_frames_decides_unless_told(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = random_latents((6, 2, 3))
    assert [chunk.shape[2] for chunk in vae.decode(latents)] == [1, 4, 4, 4, 4, 4], "on a CPU one by one"
    monkeypatch.setattr("cosmos3_core.vae.video.latents_to_fill", lambda device, is_split: 18)
    assert [chunk.shape[2] for chunk in vae.decode(latents)] == [1, 12, 8]
    assert torch.equal(whole(vae.decode(latents)), whole(vae.decode(latents, chunk_latents=3)))


def module_contents(vae: VideoVAE) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in vae.named_modules()}


def test_clips_taking_turns_do_not_disturb_each_other(vae: VideoVAE) -> None:
    one, other = random_latents((4, 2, 3), seed=3), random_latents((4, 3, 2), seed=4)
    alone = whole(vae.decode(one)), whole(vae.decode(other, chunk_latents=2))
    pixels = random_pixels(5, 32, 48)
    encoded_alone = vae.encode(pixels)
    before = module_contents(vae)

    turns: tuple[list[Tensor], list[Tensor]] = ([], [])
    clips = [vae.decode(one), vae.decode(other, chunk_latents=2)]
    abandoned = vae.decode(one)
    next(abandoned)
    for _ in range(4):
        for clip, chunks in zip(clips, turns, strict=True):
            chunks.extend(chunk for chunk in [next(clip, None)] if chunk is not None)
        assert torch.equal(vae.encode(pixels), encoded_alone)

    assert torch.equal(torch.cat(turns[0], dim=2), alone[0])
    assert torch.equal(torch.cat(turns[1], dim=2), alone[1])
    assert module_contents(vae) == before, "something of a clip stayed on the module"


def test_the_cache_keeps_no_more_than_it_needs(vae: VideoVAE) -> None:
    """Frames, not views into windows; and their number does not grow."""
    caches, num_bytes = [], []
    vae.decoder.register_forward_hook(lambda _, args, output: caches.append(args[1]))
    for _ in vae.decode(random_latents((5, 3, 2)), chunk_latents=2):
        held = [frames for frames in caches[-1].frames if frames is not None]
        assert all(frames.untyped_storage().nbytes() == frames.nbytes for frames in held)
        num_bytes.append(sum(frames.nbytes for frames in held))
    assert num_bytes[1] == num_bytes[2]
    assert len(held) == vae.decoder.num_slots


def test_peak_memory_does_not_grow_with_the_clip(vae: VideoVAE) -> None:
    def drain(latents: Tensor) -> None:
        for _ in vae.decode(latents):
            pass

    short, long = random_latents((4, 3, 2)), random_latents((10, 3, 2))
    short_peak, long_peak = peak_bytes(lambda: drain(short)), peak_bytes(lambda: drain(long))
    # The decoder's input is made before the first chunk: that one tensor is as long as the clip.
    assert long_peak <= short_peak + (long.nbytes - short.nbytes)
    # Had the pixels been kept, they alone would be sixty times that much.
    assert long_peak >= short_peak


def test_decoding_holds_less_than_diffusers(vae: VideoVAE, reference: AutoencoderKLWan) -> None:
    latents = random_latents((4, 4, 4))

    def drain() -> None:
        for _ in vae.decode(latents):
            pass

    num_pixel_bytes = 3 * 13 * 64 * 64 * 4
    assert peak_bytes(drain) < peak_bytes(lambda: reference_decode(reference, latents)) - num_pixel_bytes


# Parts


def test_a_window_is_history_then_chunk_inside_zeros() -> None:
    conv = CausalConv3d(2, 2, (3, 3, 3), VideoOps())
    conv.slot = 0
    cache = FrameCache(1)
    x = torch.randn(1, 2, 5, 4, 3)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
    assert torch.equal(conv.window(x[:, :, :1], cache), padded[:, :, :3])
    assert torch.equal(conv.window(x[:, :, 1:2], cache), padded[:, :, 1:4])
    assert torch.equal(conv.window(x[:, :, 2:], cache), padded[:, :, 2:])


@pytest.mark.parametrize("is_first_chunk", [True, False])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "doubles_time"),
    [(4, 4, True), (4, 2, True), (8, 2, True), (16, 2, True), (4, 4, False), (4, 2, False), (8, 2, False)],
)
def test_duplication_follows_its_formula(
    in_channels: int, out_channels: int, doubles_time: bool, is_first_chunk: bool
) -> None:
    time_factor = 2 if doubles_time else 1
    ratio, num_positions = in_channels // out_channels, 4 * time_factor
    x = torch.randn(1, in_channels, 1 if is_first_chunk else 3, 2, 3)
    expected = torch.empty(1, out_channels, x.shape[2] * time_factor, 4, 6)
    for t in range(time_factor):
        for h in range(2):
            for w in range(2):
                position = (t * 2 + h) * 2 + w
                picked = [c * ratio + position * ratio // num_positions for c in range(out_channels)]
                expected[:, :, t::time_factor, h::2, w::2] = x[:, picked]
    if is_first_chunk:
        expected = expected[:, :, -1:]
    y = torch.ones_like(expected)
    DuplicateUp(in_channels, out_channels, VideoOps(), doubles_time=doubles_time)(y, x, None)
    assert torch.equal(y, expected + 1)


def test_a_patch_counts_its_rows_fastest() -> None:
    pixels = torch.randn(2, 3, 2, 4, 6)
    patched = patchify(pixels, 2)
    for column, row in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert torch.equal(patched[:, column * 2 + row :: 4], pixels[..., row::2, column::2])
    assert torch.equal(unpatchify(patched, 2), pixels)


# Wrong input


@pytest.mark.parametrize("shape", [(48, 3, 2, 2), (1, 16, 3, 2, 2), (1, 48, 0, 2, 2), (1, 48, 3, 2, 0)])
def test_wrong_latents_are_refused_at_the_call(vae: VideoVAE, shape: tuple[int, ...]) -> None:
    calls = count_calls(vae.decoder)
    for refuse in (vae.decode, vae.check_latents):
        with pytest.raises(RequestError, match="batch, 48, frames, rows, columns"):
            refuse(torch.zeros(shape))
    assert calls == []


def test_a_chunk_has_at_least_one_latent_frame(vae: VideoVAE) -> None:
    with pytest.raises(RequestError, match="chunk_latents must be 1 or more latent frames .got 0"):
        vae.decode(random_latents((2, 1, 1)), chunk_latents=0)


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((1, 3, 4, 32, 32), "num_frames must be 1 \\+ 4k \\(got 4\\); use 5"),
        ((1, 3, 5, 24, 32), "height must be a multiple of 16 pixels \\(got 24"),
        ((1, 3, 5, 32, 40), "width must be a multiple of 16 pixels \\(got 40"),
        ((1, 4, 5, 32, 32), "pixels_BCFYX"),
        ((3, 5, 32, 32), "pixels_BCFYX"),
        ((1, 3, 0, 32, 32), "pixels_BCFYX"),
    ],
)
def test_wrong_pixels_are_refused(vae: VideoVAE, shape: tuple[int, ...], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        vae.encode(torch.zeros(shape))


def test_without_encoder_nothing_encodes() -> None:
    vae = VideoVAE(small_config(), with_encoder=False)
    assert {name.split(".")[0] for name in vae.state_dict()} == {"decoder", "post_quant_conv"}
    with pytest.raises(CapabilityError, match="with_encoder=True"):
        vae.encode(random_pixels(1, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim_mult": (1, 3, 4, 4)}, "dim_mult"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(small_config(), **change)
    with pytest.raises(CapabilityError, match=message), torch.device("meta"):
        VideoVAE(config)
