"""The transformer's parts on their own; the whole is compared with diffusers in parity/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.engine import Engine
from cosmos3_core.model.rope import RopeTable, after_text, apply_rope, grid_positions, rope_table, text_positions
from cosmos3_core.model.transformer import Cosmos3Transformer, VideoHead
from cosmos3_core.shapes import TokenGrid

CPU = torch.device("cpu")


@pytest.fixture
def transformer(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> Cosmos3Transformer:
    return engine_for(tiny_nano).denoiser.transformer


def rope_for(transformer: Cosmos3Transformer, grid: TokenGrid, num_text_tokens: int) -> RopeTable:
    positions = after_text(
        grid_positions(grid, fps=24.0, temporal=4, config=transformer.config), num_text_tokens, transformer.config
    )
    return rope_table(positions, transformer.config, device=CPU, dtype=torch.float32)


def velocity(transformer: Cosmos3Transformer, z_BCTHW: Tensor, mask_T: Tensor, timestep: int) -> Tensor:
    text = transformer.prefill(torch.tensor([5, 6, 7]))
    _, _, t, h, w = z_BCTHW.shape
    rope = rope_for(transformer, TokenGrid(t, (h + 1) // 2, (w + 1) // 2), 3)
    return transformer.velocity({"video": z_BCTHW}, {"video": mask_T}, timestep, text, rope)["video"]


def test_patches_are_row_column_channel_with_zeros_below_and_right() -> None:
    config = TransformerConfig(hidden_size=192, latent_channel=48)
    head = VideoHead(config)
    head.proj_in.weight.data = torch.eye(192)
    head.proj_in.bias.data.zero_()
    head.proj_out.weight.data = torch.eye(192)
    head.proj_out.bias.data.zero_()
    z_BCTHW = torch.randn(1, 48, 2, 3, 5)
    tokens = head.embed(z_BCTHW, torch.ones(2), torch.zeros(192))
    assert tokens.shape == (2 * 2 * 3, 192)
    assert torch.equal(tokens[0].view(2, 2, 48)[1, 0], z_BCTHW[0, :, 0, 1, 0])
    last = tokens[-1].view(2, 2, 48)  # rows 2 and 3 (padding), columns 4 and 5 (padding)
    assert torch.equal(last[0, 0], z_BCTHW[0, :, 1, 2, 4])
    assert not last[1].any()
    assert not last[0, 1].any()
    assert torch.equal(head.assemble(head.project(tokens), z_BCTHW, torch.ones(2)), z_BCTHW)


def test_clean_frames_get_no_velocity_and_no_timestep(transformer: Cosmos3Transformer) -> None:
    z_BCTHW = torch.randn(1, 48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask_T = torch.tensor([0.0, 1.0, 1.0])
    early, late = velocity(transformer, z_BCTHW, mask_T, 999), velocity(transformer, z_BCTHW, mask_T, 100)
    assert not early[:, :, 0].any()
    assert early[:, :, 1:].abs().min() > 0
    assert not torch.allclose(early, late)
    head = transformer.heads["video"]
    time_M = torch.randn(transformer.config.hidden_size)
    tokens = head.embed(z_BCTHW, mask_T, time_M)
    plain = head.embed(z_BCTHW, torch.zeros(3), time_M)
    assert torch.equal(tokens[:4], plain[:4])
    assert torch.allclose(tokens[4:] - plain[4:], time_M.expand(8, -1), atol=1e-5)


def test_the_prompt_never_sees_the_latents_and_later_tokens_never_change_earlier_keys(
    transformer: Cosmos3Transformer,
) -> None:
    short, long = transformer.prefill(torch.tensor([5, 6, 7])), transformer.prefill(torch.tensor([5, 6, 7, 8, 9]))
    assert short.num_tokens == 3
    for ours, theirs in zip((*short.keys, *short.values), (*long.keys, *long.values), strict=True):
        assert torch.allclose(ours, theirs[:3], atol=1e-5)


def test_text_keys_and_values_own_their_memory(transformer: Cosmos3Transformer) -> None:
    """A view into a fused projection would keep three times the bytes alive that the cache counts."""
    text = transformer.prefill(torch.arange(20))
    held = sum(x.untyped_storage().nbytes() for x in (*text.keys, *text.values))
    assert held == text.num_bytes


def test_rope_slots_cycle_through_the_axes() -> None:
    config = TransformerConfig()  # the real one: 64 slots, sections 24, 20, 20
    axes = []
    for slot in range(64):
        changed = []
        for axis in range(3):
            positions = torch.zeros(3, 1)
            positions[axis] = 1.0
            table = rope_table(positions, config, device=CPU, dtype=torch.float32)
            if table.sin[0, slot] != 0:
                changed.append("THW"[axis])
        axes.append("".join(changed))
    assert axes == ["T", "H", "W"] * 20 + ["T"] * 4


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    config = replace(TransformerConfig(), head_dim=16, rope_axes_dim=(4, 2, 2))
    table = rope_table(text_positions(10), config, device=CPU, dtype=torch.float32)
    q, k = torch.randn(16), torch.randn(16)
    rotated_q, rotated_k = (apply_rope(x.expand(10, 1, 16), table)[:, 0] for x in (q, k))
    assert torch.allclose(rotated_q.norm(dim=-1), q.norm().expand(10), atol=1e-5)
    scores = rotated_q @ rotated_k.T
    assert torch.allclose(scores[2, 5], scores[6, 9], atol=1e-4)
    assert not torch.allclose(scores[2, 5], scores[2, 6], atol=1e-2)
