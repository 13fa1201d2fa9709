"""Cosmos3's transformer: prompt -> keys and values once, noisy latents -> velocity at every step.

Shape letters: L text tokens, S generated tokens, M width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.model.heads import ActionHead, Head, SoundHead, VideoHead
from cosmos3_core.model.layers import TimeEmbedder, take_rows
from cosmos3_core.model.rope import RopeTable, rope_table, text_positions
from cosmos3_core.model.towers import GenerationTower, TextKV, UnderstandingTower
from cosmos3_core.ops.registry import Ops

VIDEO, SOUND, ACTION = "video", "sound", "action"
"""The modalities in the order of their tokens; a checkpoint may lack the heads of some."""


class Cosmos3Transformer(nn.Module):
    """Both towers and the heads (NVIDIA Cosmos3; behaviour matched to diffusers 0.42.1 in fp32).

    Args:
        config: ``transformer/config.json``, with this rank's head and FFN sizes if those are split.
        ops: implementations of the operators, see :mod:`cosmos3_core.ops`.
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.understanding = UnderstandingTower(config, ops)
        self.generation = GenerationTower(config, ops)
        self.time_embedder = TimeEmbedder(config.hidden_size)
        heads: dict[str, nn.Module] = {VIDEO: VideoHead(config)}
        if config.sound_gen:
            heads[SOUND] = SoundHead(config)
        if config.action_gen:
            heads[ACTION] = ActionHead(config)
        self.heads: Mapping[str, Head] = nn.ModuleDict(heads)  # type: ignore[assignment]

    def use_ops(self, ops: Ops) -> None:
        """Replace the implementations of the operators."""
        module: Any
        for module in self.modules():
            if hasattr(module, "ops"):
                module.ops = ops

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
        domain_id: int | None = None,
    ) -> dict[str, Tensor]:
        """Run one forward pass of the generation tower.

        Args:
            latents: modality -> noisy latents, see :mod:`cosmos3_core.model.heads`; any dtype.
            noise_masks: modality -> [T], 1 where a latent frame is noisy, 0 where it is a clean condition.
            timestep: the schedule's integer timestep, 0..1000.
            text: the prompt, from :meth:`prefill`.
            rope: rotary table of all generated tokens after that prompt, modalities in the order of ``latents``.
            domain_id: the embodiment's, with actions.

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
            tokens.append(self.heads[name].embed(latent, noise_masks[name], time_M, mine, domain_id=domain_id))
            first += count
        x_SM = self.generation(take_rows(torch.cat(tokens), slice(0, rows.stop - rows.start)), text, rope)
        velocities = {}
        for index, (name, latent) in enumerate(inputs.items()):
            # Projected before the gather: a patch has a twentieth of a token's values.
            values = self.ops.all_tokens(self.heads[name].project(x_SM, domain_id=domain_id), sum(counts))
            velocities[name] = self.heads[name].assemble(values.split(counts)[index], latent, noise_masks[name])
        return velocities
