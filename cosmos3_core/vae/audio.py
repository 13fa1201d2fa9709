"""The audio VAE's decoder: sound latents -> waveform, window by window.

Tensors end in their axes: C channels, T latents, S samples, B sounds (one here).

The network has a finite receptive field: each stretch of a sound depends on its own latents and a few on either side
(``AudioVAE.halo_latents``). A long sound is decoded in windows that overlap by as many latents, and the middle of each
is used; to fp32 rounding the result equals the sound decoded whole.

Parameters have the names of the published tensors, so loading renames nothing. Latents are those of the transformer,
without statistics. There is no encoder: no mode takes sound as input.

Source: the published Cosmos3AVAEAudioTokenizer weights and config.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import AudioVAEConfig
from cosmos3_core.errors import RequestError
from cosmos3_core.vae.audio_blocks import AudioDecoder

CHUNK_LATENTS = 512
"""Default latents of a chunk: 20 s of sound, longer than most requests."""


class AudioVAE(nn.Module):
    """Decoder from sound latents to a waveform in [-1, 1].

    Attributes:
        halo_latents: latents before and after a stretch that its samples depend on; computed from the kernels, strides
            and dilations.

    Raises:
        CapabilityError: the config contradicts itself, or its decoder does not lengthen by its strides.
    """

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        # The published lists run from the waveform to the latents; decoding goes the other way.
        self.decoder = AudioDecoder(
            tuple(config.dec_dim * multiple for multiple in (1, *config.dec_c_mults))[::-1],
            config.dec_strides[::-1],
            in_channels=config.vocoder_input_dim,
            out_channels=config.dec_out_channels,
        )
        # The latents that the samples of latent 0 depend on.
        first, last = self.decoder.inputs_of(0, config.hop_size - 1)
        self.halo_latents = (-first, last)

    @property
    def sampling_rate(self) -> int:
        """Samples per second and channel."""
        return self.config.sampling_rate

    @property
    def hop_size(self) -> int:
        """Samples per latent and channel."""
        return self.config.hop_size

    @property
    def num_channels(self) -> int:
        """Channels of the sound; 2 is stereo, left first."""
        return self.config.dec_out_channels

    def decode(self, latents_CT: Tensor, *, chunk_latents: int = CHUNK_LATENTS) -> Iterator[Tensor]:
        """Decode a sound lazily, computed in the module's dtype.

        Memory grows with ``chunk_latents``, not with the length of the sound. A sound of one chunk is decoded whole.

        Args:
            latents_CT: [vocoder_input_dim, T], on any device.

        Returns:
            An iterator of waveform chunks [num_channels, S] in [-1, 1], fp32 on the module's device: S is
            ``chunk_latents`` x ``hop_size``, less in the last; together T x ``hop_size``.

        Raises:
            RequestError: the latents have another shape, or ``chunk_latents`` is below 1. This call raises it, not the
                iterator.
        """
        num_in = self.config.vocoder_input_dim
        if latents_CT.dim() != 2 or latents_CT.shape[0] != num_in or latents_CT.shape[1] == 0:
            raise RequestError("latents_CT", tuple(latents_CT.shape), f"({num_in}, latents), at least 1 latent")
        if chunk_latents < 1:
            raise RequestError("chunk_latents", chunk_latents, "1 or more latents")
        return self._decode(latents_CT, chunk_latents)

    def _decode(self, latents_CT: Tensor, chunk_latents: int) -> Iterator[Tensor]:
        num_latents = latents_CT.shape[1]
        for start in range(0, num_latents, chunk_latents):
            yield self._decode_stretch(latents_CT, start, min(start + chunk_latents, num_latents))

    @torch.no_grad()
    def _decode_stretch(self, latents_CT: Tensor, start: int, stop: int) -> Tensor:
        """Decode the samples of the latents from ``start`` to before ``stop``."""
        num_before, num_behind = self.halo_latents
        # Not beyond the sound's ends, where every layer must see zeros; zero latents would not give zeros.
        window_start = max(start - num_before, 0)
        parameter = self.decoder.conv1.weight_v
        window_1CT = latents_CT[:, window_start : stop + num_behind].to(parameter.device, parameter.dtype).unsqueeze(0)
        samples_CS = self.decoder(window_1CT).squeeze(0)
        kept = slice((start - window_start) * self.hop_size, (stop - window_start) * self.hop_size)
        # A copy even with the same dtype: a view would keep the whole window alive.
        return samples_CS[:, kept].to(torch.float32, copy=True).clamp_(-1.0, 1.0)
