"""Cosmos3's transformer: prompt -> keys and values once, noisy latents -> velocity at every step.

Shape letters: B batch (always 1), C latent channels, T/H/W latent grid, L text tokens, S generated tokens, M width,
P values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.model.layers import TimeEmbedder, take_rows
from cosmos3_core.model.rope import RopeTable, rope_table, text_positions
from cosmos3_core.model.towers import GenerationTower, TextKV, UnderstandingTower
from cosmos3_core.ops.registry import Ops

VIDEO = "video"


class VideoHead(nn.Module):
    """Video latents <-> tokens: 2 x 2 patches, channel fastest, odd grids zero-padded bottom and right."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch = config.latent_patch_size
        self.proj_in = nn.Linear(config.patch_latent_dim, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.patch_latent_dim)

    def num_tokens(self, z_BCTHW: Tensor) -> int:
        """How many tokens some latents are."""
        return z_BCTHW.shape[2] * -(-z_BCTHW.shape[3] // self.patch) * -(-z_BCTHW.shape[4] // self.patch)

    def embed(self, z_BCTHW: Tensor, noise_mask_T: Tensor, time_M: Tensor, rows: slice = slice(None)) -> Tensor:
        """Tokens [S, M], those in ``rows``. Clean frames (mask 0) get no time embedding at all."""
        p = self.patch
        _, c, t, h, w = z_BCTHW.shape
        z_CTHW = F.pad(z_BCTHW[0], (0, -w % p, 0, -h % p))
        patches = z_CTHW.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # C T rows p columns p
        patches_SP = patches.permute(1, 2, 4, 3, 5, 0).reshape(-1, p * p * c)
        noise_mask_S = noise_mask_T.repeat_interleave(patches_SP.shape[0] // t)
        x_SM = self.proj_in(patches_SP[rows])
        return x_SM + noise_mask_S[rows, None].to(x_SM.dtype) * time_M.to(x_SM.dtype)

    def project(self, x_SM: Tensor) -> Tensor:
        """Tokens -> patches [S, patch * patch * C] of the velocity."""
        return self.proj_out(x_SM)

    def assemble(self, patches_SP: Tensor, z_BCTHW: Tensor, noise_mask_T: Tensor) -> Tensor:
        """Velocity [1, C, T, H, W] in the patches' dtype; zero at clean frames. ``z_BCTHW`` gives the grid."""
        p = self.patch
        _, c, t, h, w = z_BCTHW.shape
        rows, columns = (h + -h % p) // p, (w + -w % p) // p
        patches = patches_SP.view(t, rows, columns, p, p, c)
        v_CTHW = patches.permute(5, 0, 1, 3, 2, 4).reshape(c, t, rows * p, columns * p)[:, :, :h, :w]
        return (v_CTHW * noise_mask_T[:, None, None].to(v_CTHW.dtype)).unsqueeze(0)


class Cosmos3Transformer(nn.Module):
    """Both towers and the heads (NVIDIA Cosmos3; behaviour matched to diffusers 0.42.1 in fp32).

    Args:
        config: ``transformer/config.json``, with local head and FFN sizes where those are split.
        ops: implementations of the operators, see :mod:`cosmos3_core.ops`.
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.understanding = UnderstandingTower(config, ops)
        self.generation = GenerationTower(config, ops)
        self.time_embedder = TimeEmbedder(config.hidden_size)
        self.heads: Mapping[str, VideoHead] = nn.ModuleDict({VIDEO: VideoHead(config)})  # type: ignore[assignment]

    def use_ops(self, ops: Ops) -> None:
        """Take other implementations of the operators from now on."""
        self.ops = self.generation.ops = ops
        for layer in (*self.understanding.layers, *self.generation.layers):
            layer.ops = ops

    @property
    def device(self) -> torch.device:
        return self.generation.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.generation.norm.weight.dtype

    def prefill(self, text_ids_L: Tensor) -> TextKV:
        """Run the understanding tower over one prompt's token ids [L]; the result serves every step."""
        rope = rope_table(text_positions(text_ids_L.shape[0]), self.config, device=self.device, dtype=self.dtype)
        return self.understanding(text_ids_L.to(self.device), rope)

    def velocity(
        self,
        latents: Mapping[str, Tensor],
        noise_masks: Mapping[str, Tensor],
        timestep: int,
        text: TextKV,
        rope: RopeTable,
    ) -> dict[str, Tensor]:
        """One forward pass of the generation tower.

        Args:
            latents: modality -> noisy latents; video is [1, C, T, H, W]; any dtype.
            noise_masks: modality -> 1 where a latent frame is noisy, 0 where it is a clean condition; [T] for video.
            timestep: the schedule's integer timestep, 0..1000.
            text: the prompt, from :meth:`prefill`.
            rope: of all generated tokens behind that prompt, modalities in the order of ``latents``.

        Returns:
            modality -> velocity (noise - clean), shaped like the latents, in the model's dtype.
        """
        scaled = torch.tensor(timestep, device=self.device) * self.config.timestep_scale
        time_M = self.time_embedder(scaled)
        inputs = {name: latent.to(self.dtype) for name, latent in latents.items()}
        counts = [self.heads[name].num_tokens(latent) for name, latent in inputs.items()]
        rows = self.ops.own_rows(sum(counts))
        tokens, first = [], 0
        for (name, latent), count in zip(inputs.items(), counts, strict=True):
            mine = slice(max(rows.start - first, 0), max(rows.stop - first, 0))
            tokens.append(self.heads[name].embed(latent, noise_masks[name], time_M, mine))
            first += count
        x_SM = self.generation(take_rows(torch.cat(tokens), slice(0, rows.stop - rows.start)), text, rope)
        velocities = {}
        for index, (name, latent) in enumerate(inputs.items()):
            # Every token worked on here goes through every head: patches are a twentieth of a token to bring together.
            patches_SP = self.ops.all_tokens(self.heads[name].project(x_SM), sum(counts)).split(counts)[index]
            velocities[name] = self.heads[name].assemble(patches_SP, latent, noise_masks[name])
        return velocities
