"""The heads of the generation tower, one per modality: latents -> tokens, tokens -> velocity.

Shape letters: B batch (always 1), C channels, T/H/W latent grid or T steps of a track, S tokens, M width, P values of a
patch, D embodiment domains.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import TransformerConfig

_ALL = slice(None)


class Head(Protocol):
    """Interface of the transformer to every modality; ``domain_id`` is for heads with weights by embodiment."""

    def num_tokens(self, z: Tensor) -> int:
        """Return the number of tokens of some latents."""

    def embed(
        self, z: Tensor, noise_mask_T: Tensor, time_M: Tensor, rows: slice = _ALL, *, domain_id: int | None = None
    ) -> Tensor:
        """Return the tokens [S, M] in ``rows``. Clean frames (mask 0) get no time embedding."""

    def project(self, x_SM: Tensor, *, domain_id: int | None = None) -> Tensor:
        """Return the values of the velocity, one row per token."""

    def assemble(self, values: Tensor, z: Tensor, noise_mask_T: Tensor) -> Tensor:
        """Assemble rows into the velocity, shaped like the latents ``z``, in the rows' dtype; zero at clean frames."""


def _add_time(x_SM: Tensor, noise_mask_S: Tensor, time_M: Tensor) -> Tensor:
    return x_SM + noise_mask_S[:, None].to(x_SM.dtype) * time_M.to(x_SM.dtype)


class VideoHead(nn.Module):
    """Video latents [1, C, T, H, W] <-> tokens: 2 x 2 patches, channel fastest; odd grids are padded with zeros."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch = config.latent_patch_size
        self.proj_in = nn.Linear(config.patch_latent_dim, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.patch_latent_dim)

    def num_tokens(self, z_BCTHW: Tensor) -> int:
        return z_BCTHW.shape[2] * -(-z_BCTHW.shape[3] // self.patch) * -(-z_BCTHW.shape[4] // self.patch)

    def embed(
        self, z_BCTHW: Tensor, noise_mask_T: Tensor, time_M: Tensor, rows: slice = _ALL, *, domain_id: int | None = None
    ) -> Tensor:
        p = self.patch
        _, c, t, h, w = z_BCTHW.shape
        z_CTHW = F.pad(z_BCTHW[0], (0, -w % p, 0, -h % p))
        patches = z_CTHW.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # C T rows p columns p
        patches_SP = patches.permute(1, 2, 4, 3, 5, 0).reshape(-1, p * p * c)
        noise_mask_S = noise_mask_T.repeat_interleave(patches_SP.shape[0] // t)
        return _add_time(self.proj_in(patches_SP[rows]), noise_mask_S[rows], time_M)

    def project(self, x_SM: Tensor, *, domain_id: int | None = None) -> Tensor:
        """Return the patches [S, patch * patch * C] of the velocity."""
        return self.proj_out(x_SM)

    def assemble(self, patches_SP: Tensor, z_BCTHW: Tensor, noise_mask_T: Tensor) -> Tensor:
        p = self.patch
        _, c, t, h, w = z_BCTHW.shape
        rows, columns = (h + -h % p) // p, (w + -w % p) // p
        patches = patches_SP.view(t, rows, columns, p, p, c)
        v_CTHW = patches.permute(5, 0, 1, 3, 2, 4).reshape(c, t, rows * p, columns * p)[:, :, :h, :w]
        return (v_CTHW * noise_mask_T[:, None, None].to(v_CTHW.dtype)).unsqueeze(0)


class SoundHead(nn.Module):
    """Sound latents [C, T] <-> one token per step."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.sound_dim, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.sound_dim)
        self.modality_embed = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)

    def num_tokens(self, z_CT: Tensor) -> int:
        return z_CT.shape[1]

    def embed(
        self, z_CT: Tensor, noise_mask_T: Tensor, time_M: Tensor, rows: slice = _ALL, *, domain_id: int | None = None
    ) -> Tensor:
        return _add_time(self.proj_in(z_CT.T[rows]) + self.modality_embed, noise_mask_T[rows], time_M)

    def project(self, x_SM: Tensor, *, domain_id: int | None = None) -> Tensor:
        """Return the velocity [T, C]."""
        return self.proj_out(x_SM)

    def assemble(self, v_TC: Tensor, z_CT: Tensor, noise_mask_T: Tensor) -> Tensor:
        return v_TC.T * noise_mask_T.to(v_TC.dtype)


class DomainLinear(nn.Module):
    """A linear layer with separate weights for every embodiment domain, one flattened [in, out] matrix per row."""

    def __init__(self, num_in: int, num_out: int, num_domains: int) -> None:
        super().__init__()
        self.num_in = num_in
        self.weight = nn.Parameter(torch.empty(num_domains, num_in * num_out), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_domains, num_out), requires_grad=False)

    def forward(self, x: Tensor, domain_id: int) -> Tensor:
        return x @ self.weight[domain_id].view(self.num_in, -1) + self.bias[domain_id]


class ActionHead(nn.Module):
    """Actions [T, C] <-> one token per action."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.proj_in = DomainLinear(config.action_dim, config.hidden_size, config.num_embodiment_domains)
        self.proj_out = DomainLinear(config.hidden_size, config.action_dim, config.num_embodiment_domains)
        self.modality_embed = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)

    def num_tokens(self, z_TC: Tensor) -> int:
        return z_TC.shape[0]

    def embed(
        self, z_TC: Tensor, noise_mask_T: Tensor, time_M: Tensor, rows: slice = _ALL, *, domain_id: int | None = None
    ) -> Tensor:
        assert domain_id is not None, "actions have an embodiment"
        return _add_time(self.proj_in(z_TC[rows], domain_id) + self.modality_embed, noise_mask_T[rows], time_M)

    def project(self, x_SM: Tensor, *, domain_id: int | None = None) -> Tensor:
        """Return the velocity [T, C]."""
        assert domain_id is not None, "actions have an embodiment"
        return self.proj_out(x_SM, domain_id)

    def assemble(self, v_TC: Tensor, z_TC: Tensor, noise_mask_T: Tensor) -> Tensor:
        return v_TC * noise_mask_T[:, None].to(v_TC.dtype)
