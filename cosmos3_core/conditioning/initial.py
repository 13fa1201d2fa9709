"""The start of denoising: noise, and the values that a request fixes; one state per modality, in drawing order.

Shape letters: C channels, T/H/W latent grid or T steps of a track, S generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.conditioning.state import LatentState
from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.model.rope import grid_positions, track_positions
from cosmos3_core.model.transformer import ACTION, SOUND, VIDEO
from cosmos3_core.shapes import Geometry


def initial_states(request: DenoiseRequest, *, geometry: Geometry, config: TransformerConfig) -> dict[str, LatentState]:
    """Return the latent states of a request on the CPU: video, then sound and actions if it has them.

    Args:
        request: the request, with its clean latents if it has clean frames.

    Raises:
        CapabilityError: the checkpoint has no weights for one of the modalities.
        RequestError: clean latents or noise have another shape, or the actions do not fit the model.
    """
    shapes: dict[str, tuple[int, ...]] = {VIDEO: (1, geometry.channels, *request.latent_shape)}
    if request.num_sound_latents:
        if not config.sound_gen:
            raise CapabilityError(
                "num_sound_latents", request.num_sound_latents, "0", "this transformer makes no sound"
            )
        shapes[SOUND] = (config.sound_dim, request.num_sound_latents)
    if request.action is not None:
        _check_action(request.action, config)
        shapes[ACTION] = (request.action.num_actions, config.action_dim)
    noise = _draw_noise(request.seed, shapes, request.noise)

    grid = geometry.token_grid(request.latent_shape)
    states = {
        VIDEO: _video_state(
            noise[VIDEO], request, grid_positions(grid, fps=request.fps, temporal=geometry.temporal, config=config)
        )
    }
    if SOUND in noise:
        rate = config.sound_latent_fps
        positions = track_positions(request.num_sound_latents, rate=rate, base_rate=config.base_fps, config=config)
        ones = torch.ones(request.num_sound_latents)
        states[SOUND] = LatentState(noise[SOUND], ones, ones, positions)
    if request.action is not None:
        positions = track_positions(
            request.action.num_actions,
            rate=request.fps,
            base_rate=config.base_fps / geometry.temporal,
            config=config,
            first=1,  # an action leads to the next frame, the first one to frame 1
        )
        states[ACTION] = _action_state(noise[ACTION], request.action, positions)
    return states


def _draw_noise(
    seed: int, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Draw standard normal noise per modality, fp32, from one CPU generator: a seed means the same everywhere.

    The draws equal diffusers 0.42.1's with a CPU generator of the same seed.

    Args:
        shapes: modality -> shape, in drawing order: video first.
        given: modality -> noise to use instead of a draw.

    Raises:
        RequestError: given noise is for an unknown modality, or has another shape.
    """
    given = dict(given or {})
    unknown = sorted(set(given) - set(shapes))
    if unknown:
        raise RequestError("noise", unknown, f"modalities of this request: {sorted(shapes)}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = {}
    for name, shape in shapes.items():
        if name not in given:
            noise[name] = torch.randn(shape, generator=generator, dtype=torch.float32)
            continue
        if tuple(given[name].shape) != tuple(shape):
            raise RequestError(f"noise.{name}", list(given[name].shape), f"a tensor of shape {list(shape)}")
        noise[name] = given[name].detach().to("cpu", torch.float32)
    return noise


def _video_state(noise: Tensor, request: DenoiseRequest, positions: Tensor) -> LatentState:
    noise_mask_T = torch.ones(request.latent_shape.num_frames)
    latent = noise
    if request.clean_frames:
        expected = [1, noise.shape[1], len(request.clean_frames), *noise.shape[3:]]
        clean = request.clean_latents
        if clean is None or list(clean.shape) != expected:
            given = None if clean is None else list(clean.shape)
            raise RequestError("clean_latents", given, f"latents of the given frames, of shape {expected}")
        frames = list(request.clean_frames)
        noise_mask_T[frames] = 0.0
        latent = noise.clone()
        latent[:, :, frames] = clean.detach().to("cpu", torch.float32)
    return LatentState(latent, noise_mask_T, noise_mask_T[:, None, None], positions)


def _action_state(noise: Tensor, action: ActionLatents, positions: Tensor) -> LatentState:
    is_noisy = float(action.given is None)
    free_mask_TC = torch.zeros_like(noise)
    free_mask_TC[:, : action.width] = is_noisy
    latent = noise * free_mask_TC
    if action.given is not None:
        latent[:, : action.width] = torch.tensor(action.given, dtype=torch.float32)
    return LatentState(latent, torch.full((action.num_actions,), is_noisy), free_mask_TC, positions)


def _check_action(action: ActionLatents, config: TransformerConfig) -> None:
    if not config.action_gen:
        raise CapabilityError("action", "given", "None", "this transformer has no weights for actions")
    if not 0 <= action.domain_id < config.num_embodiment_domains:
        raise RequestError("domain_id", action.domain_id, f"from 0 to {config.num_embodiment_domains - 1}")
    if action.num_actions < 1 or not 1 <= action.width <= config.action_dim:
        given = f"{action.num_actions} x {action.width}"
        raise RequestError("action", given, f"at least one action of 1 to {config.action_dim} numbers")
    if action.given is not None:
        rows = {len(row) for row in action.given}
        if len(action.given) != action.num_actions or rows != {action.width}:
            given = f"{len(action.given)} rows of {sorted(rows)}"
            raise RequestError("action", given, f"{action.num_actions} rows of {action.width}")
