"""The Wan 2.2 residual causal video VAE: latents -> pixels chunk by chunk, pixels -> latents.

Tensors end in their axes: B batch, C channels, T/H/W latent frames, rows, columns (grid of the level in question inside
the networks), F/Y/X pixel frames, rows, columns, h/w row and column within a patch; a 1 is an axis of one.

The VAE is causal, so a clip decodes in chunks without loss: its first latent frame alone (1 pixel frame), then any
number at a time (4 pixel frames each). One latent frame at a time equals the reference bit for bit; more at a time
equal it to fp32 rounding. The history that a chunk needs travels with the clip (:class:`FrameCache`); the module keeps
nothing, so clips can be interleaved.

Frames can be split into parts that run in several places at the same time
(:class:`cosmos3_core.vae.frame_part.FramePart`), again exact to fp32 rounding.

Parameters have the names of the published tensors, so loading renames nothing. The latents' mean and deviation are not
parameters: they come with the config.

Source: the published AutoencoderKLWan weights and config in the Wan 2.2 (residual) layout; diffusers 0.42.1 applies the
statistics in its Cosmos3 pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cosmos3_core import shapes
from cosmos3_core.checkpoint.configs import VideoVAEConfig
from cosmos3_core.device import latents_to_fill
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.ops.video import VideoOps
from cosmos3_core.vae.frame_part import WHOLE, FramePart
from cosmos3_core.vae.video_blocks import CausalConv3d, ChannelRMSNorm, FrameCache, MidBlock, number_slots
from cosmos3_core.vae.video_resample import DownBlock, VideoUpBlock


class VideoDecoder(nn.Module):
    """Latents -> patched pixels: the widest blocks first, then block by block finer and narrower."""

    def __init__(self, config: VideoVAEConfig, ops: VideoOps) -> None:
        super().__init__()
        widths = [config.decoder_base_dim * mult for mult in (*config.dim_mult, config.dim_mult[-1])][::-1]
        # Resampling reverses the encoder's, last step first; the last block has none.
        doubles_time = (*config.temperal_downsample[::-1], False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3), ops)
        self.mid_block = MidBlock(widths[0], ops)
        self.up_blocks = nn.ModuleList(
            VideoUpBlock(
                widths[level],
                widths[level + 1],
                config.num_res_blocks + 1,
                ops,
                upsamples=level != last,
                doubles_time=doubles_time[level],
            )
            for level in range(last + 1)
        )
        self.norm_out = ChannelRMSNorm(widths[-1], num_grid_axes=3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, (3, 3, 3), ops)
        self.num_slots = number_slots(self)

    def forward(self, z_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """Decode one chunk, [B, z_dim, T, H, W] -> [B, out_channels, frames, rows, columns]; updates ``cache``."""
        x_BCTHW = self.conv_in(self.conv_in.window(z_BCTHW, cache))
        x_BCTHW = self.mid_block(x_BCTHW, cache)
        for up_block in self.up_blocks:
            x_BCTHW = up_block(x_BCTHW, cache)
        x_BCTHW = self.conv_out.window(x_BCTHW, cache, norm=self.norm_out)
        return self.conv_out(x_BCTHW)


class Encoder(nn.Module):
    """Patched pixels -> latent moments, before ``quant_conv``: the decoder's mirror, one block a level shallower."""

    def __init__(self, config: VideoVAEConfig, ops: VideoOps) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        halves_time = (*config.temperal_downsample, False)
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0], (3, 3, 3), ops)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[level],
                widths[level + 1],
                config.num_res_blocks,
                ops,
                downsamples=level != last,
                halves_time=halves_time[level],
            )
            for level in range(last + 1)
        )
        self.mid_block = MidBlock(widths[-1], ops)
        self.norm_out = ChannelRMSNorm(widths[-1], num_grid_axes=3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3), ops)
        self.num_slots = number_slots(self)

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """Encode one chunk, [B, in_channels, frames, rows, columns] -> [B, 2 z_dim, T, H, W]; updates ``cache``."""
        x_BCTHW = self.conv_in(self.conv_in.window(x_BCTHW, cache))
        for down_block in self.down_blocks:
            x_BCTHW = down_block(x_BCTHW, cache)
        x_BCTHW = self.mid_block(x_BCTHW, cache)
        x_BCTHW = self.conv_out.window(x_BCTHW, cache, norm=self.norm_out)
        return self.conv_out(x_BCTHW)


class VideoVAE(nn.Module):
    """Encoder and decoder between pixels in [-1, 1] and normalised latents.

    Args:
        with_encoder: False leaves out the encoder (``encoder.*``, ``quant_conv.*``).
        ops: the operators' implementations; :func:`cosmos3_core.ops.video.select_video_ops` chooses for a device.

    Attributes:
        geometry: the compression factors, pixels <-> latents.

    Raises:
        CapabilityError: the config contradicts itself or describes another layout than Wan 2.2's.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        *,
        with_encoder: bool = True,
        ops: VideoOps = VideoOps(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry = config.geometry
        self.encoder = Encoder(config, ops) if with_encoder else None
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), ops) if with_encoder else None
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), ops)
        self.decoder = VideoDecoder(config, ops)
        self.requires_grad_(False)

    def use_channels_last(self) -> None:
        """Lay out the convolutions' weights channels last; the activations follow."""
        for parameter in self.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
            elif parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    # Decoding

    def decode(
        self, latents_BCTHW: Tensor, *, chunk_latents: int | None = None, part: FramePart = WHOLE
    ) -> Iterator[Tensor]:
        """Decode a clip lazily, chunk by chunk; keeps nothing of a chunk but the caches.

        Args:
            latents_BCTHW: normalised latents of the whole clip, fp32.
            chunk_latents: latent frames per chunk after the first, which always is one latent frame. 1 is the
                reference; more fill a device better and take more memory. None: 1 on a CPU, and on a GPU by the size of
                the largest part of a frame (:func:`cosmos3_core.shapes.chunk_latents`).
            part: the part of every frame to decode here. All parts take the same latents and iterate in step, because
                each waits for the others' borders.

        Returns:
            An iterator of pixel chunks [B, 3, F, Y, X] in [-1, 1], in the module's dtype and on its device: F is 1 at
            first, then ``chunk_latents`` x ``geometry.temporal``; the last may be shorter. Y and X are the part's; an
            empty part yields as many empty chunks.

        Raises:
            RequestError: the latents have another shape or do not fit the part, or ``chunk_latents`` is below 1. This
                call raises it, not the iterator.
        """
        self.check_latents(latents_BCTHW)
        own_BCTHW = part.cut(latents_BCTHW)
        if chunk_latents is None:
            *_, height, width = latents_BCTHW.shape
            at_least = latents_to_fill(self.post_quant_conv.weight.device, is_split=part.axis is not None)
            # The largest part, not this one: all parts must choose the same number.
            chunk_latents = shapes.chunk_latents(*part.largest(height, width), at_least)
        if chunk_latents < 1:
            raise RequestError("chunk_latents", chunk_latents, "1 or more latent frames")
        return self._decode(own_BCTHW, chunk_latents, part)

    def check_latents(self, latents_BCTHW: Tensor) -> None:
        """Make sure that latents have the shape that this decoder takes.

        Raises:
            RequestError: they are not [B, z_dim, T, H, W], each at least 1.
        """
        _check_clip("latents_BCTHW", latents_BCTHW, self.config.z_dim)

    def _decode(self, latents_BCTHW: Tensor, chunk_latents: int, part: FramePart) -> Iterator[Tensor]:
        num_frames, holds_nothing = latents_BCTHW.shape[2], 0 in latents_BCTHW.shape
        latents_BCTHW = latents_BCTHW.to(self.post_quant_conv.weight.device)
        cache = FrameCache(self.decoder.num_slots, part)
        start, stop = 0, 1
        while start < num_frames:
            chunk_BCTHW = latents_BCTHW[:, :, start:stop]
            yield self._no_pixels(chunk_BCTHW, start) if holds_nothing else self._decode_into(cache, chunk_BCTHW)
            start, stop = stop, stop + chunk_latents

    def _decoder_input(self, latents_BCTHW: Tensor) -> Tensor:
        """Convert normalised latents to the decoder's input, in the module's dtype; frame by frame.

        The rounding of the 1x1x1 convolution depends on its number of frames (the CPU picks its algorithm by size), and
        a clip must decode to the same values in any chunks.
        """
        weight = self.post_quant_conv.weight
        mean_C111, inverse_std_C111 = self._statistics()
        z_BCTHW = latents_BCTHW.to(weight.dtype) / inverse_std_C111 + mean_C111
        return torch.cat([self.post_quant_conv(frame_BC1HW) for frame_BC1HW in z_BCTHW.split(1, dim=2)], dim=2)

    @torch.no_grad()
    def _decode_into(self, cache: FrameCache, latents_BCTHW: Tensor) -> Tensor:
        """Decode one chunk; updates ``cache``."""
        patched_BCTHW = self.decoder(self._decoder_input(latents_BCTHW), cache)
        cache.is_first_chunk = False
        return unpatchify(patched_BCTHW.clamp_(-1.0, 1.0), self.config.patch_size)

    def _no_pixels(self, latents_BCTHW: Tensor, start: int) -> Tensor:
        """Return the pixels of a chunk without rows or columns that begins at latent frame ``start``."""
        batch, _, num_frames, height, width = latents_BCTHW.shape
        frames = num_frames * self.geometry.temporal if start else 1
        side, weight = self.geometry.spatial, self.post_quant_conv.weight
        return weight.new_empty((batch, self._num_colours, frames, height * side, width * side))

    # Encoding

    @torch.no_grad()
    def encode(self, pixels_BCFYX: Tensor, *, part: FramePart = WHOLE) -> Tensor:
        """Encode a clip: the posterior's mean, normalised; nothing is drawn.

        Args:
            pixels_BCFYX: [B, 3, F, Y, X] in [-1, 1]; F is 1 + a multiple of ``geometry.temporal``, Y and X are
                multiples of ``geometry.spatial``.
            part: the part of every frame to encode here; all parts take the same pixels at the same time.

        Returns:
            Latents [B, z_dim, T, H, W] of the whole frames on every part, in the module's dtype and on its device.

        Raises:
            RequestError: the pixels have another shape or do not fit the part.
            CapabilityError: this VAE was built without its encoder.
        """
        if self.encoder is None or self.quant_conv is None:
            raise CapabilityError(
                "encode", "pixels", "left out: this VAE only decodes", "build the VAE with with_encoder=True to encode"
            )
        self._check_pixels(pixels_BCFYX)
        own_BCFYX = part.cut(pixels_BCFYX, self.geometry.spatial)
        if 0 in own_BCFYX.shape:
            return part.share(self._no_latents(own_BCFYX))
        weight = self.quant_conv.weight
        cache = FrameCache(self.encoder.num_slots, part)
        moments: list[Tensor] = []
        # Frame 0 alone, then the pixel frames of one latent frame at a time.
        start, stop = 0, 1
        while start < own_BCFYX.shape[2]:
            chunk_BCFYX = own_BCFYX[:, :, start:stop].to(weight.device, weight.dtype)
            moments.append(self.encoder(patchify(chunk_BCFYX, self.config.patch_size), cache))
            cache.is_first_chunk = False
            start, stop = stop, stop + self.geometry.temporal
        mean_and_log_variance_BCTHW = self.quant_conv(torch.cat(moments, dim=2))
        z_BCTHW = mean_and_log_variance_BCTHW[:, : self.config.z_dim]
        mean_C111, inverse_std_C111 = self._statistics()
        return part.share((z_BCTHW - mean_C111) * inverse_std_C111)

    def _no_latents(self, pixels_BCFYX: Tensor) -> Tensor:
        """Return the latents of a clip without rows or columns."""
        batch, _, *clip = pixels_BCFYX.shape
        return self.post_quant_conv.weight.new_empty((batch, self.config.z_dim, *self.geometry.latent_shape(*clip)))

    def _check_pixels(self, pixels_BCFYX: Tensor) -> None:
        _check_clip("pixels_BCFYX", pixels_BCFYX, self._num_colours)
        _, _, num_frames, height, width = pixels_BCFYX.shape
        temporal, spatial = self.geometry.temporal, self.geometry.spatial
        if self.geometry.round_up_num_frames(num_frames) != num_frames:
            raise RequestError(
                "num_frames",
                num_frames,
                f"1 + {temporal}k",
                f"use {self.geometry.round_up_num_frames(num_frames)}",
            )
        for name, num_pixels in (("height", height), ("width", width)):
            if num_pixels % spatial:
                raise RequestError(name, num_pixels, f"a multiple of {spatial} pixels", "resize or pad before encoding")

    @property
    def _num_colours(self) -> int:
        return self.config.in_channels // self.config.patch_size**2

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return the latents' mean and inverse deviation [z_dim, 1, 1, 1].

        Rounded to the module's dtype before the division, and divided on the CPU, as the reference pipeline does it.
        """
        weight = self.post_quant_conv.weight
        shape_C111 = (self.config.z_dim, 1, 1, 1)
        mean_C = torch.tensor(self.config.latents_mean, dtype=weight.dtype, device="cpu")
        std_C = torch.tensor(self.config.latents_std, dtype=weight.dtype, device="cpu")
        return mean_C.view(shape_C111).to(weight.device), (1.0 / std_C).view(shape_C111).to(weight.device)


def patchify(pixels_BCFYX: Tensor, patch_size: int) -> Tensor:
    """Fold patches into channels: [B, C, F, Y, X] -> [B, C p p, F, Y/p, X/p], a patch's rows fastest."""
    patches_BCFHhWw = pixels_BCFYX.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    return patches_BCFHhWw.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x_BCTHW: Tensor, patch_size: int) -> Tensor:
    """Invert :func:`patchify`: [B, C p p, F, H, W] -> [B, C, F, H p, W p], contiguous."""
    patches_BCwhTHW = x_BCTHW.unflatten(1, (-1, patch_size, patch_size))
    return patches_BCwhTHW.permute(0, 1, 4, 5, 3, 6, 2).contiguous().flatten(5, 6).flatten(3, 4)


def _check_clip(field: str, clip: Tensor, num_channels: int) -> None:
    """Refuse a tensor that is not [B, num_channels, frames, rows, columns], each at least 1."""
    if clip.dim() != 5 or clip.shape[1] != num_channels or 0 in clip.shape:
        raise RequestError(field, tuple(clip.shape), f"(batch, {num_channels}, frames, rows, columns), each at least 1")
