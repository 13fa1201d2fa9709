"""Fits a VAE's preview map: least squares over synthetic pictures that the VAE itself encodes.

The cost is bounded: 32 pictures of 128 x 128 pixels, one frame each, 64 latent positions per picture. The map is fitted
to single frames; later latent frames of a clip, of four pixel frames each, use the same map.

Shape letters: B pictures, P latent positions of all pictures, C latent channels, R the three colours, T/H/W latent
frames, rows, columns, F/Y/X pixel frames, rows, columns; a 1 is an axis of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from cosmos3_core.errors import CapabilityError, MediaError
from cosmos3_core.media.output import OutputFile
from cosmos3_core.preview import PreviewMap
from cosmos3_core.vae.video import VideoVAE

logger = logging.getLogger(__name__)

_SIDE = 128
_NUM_PICTURES, _SEED = 32, 0
_NUM_HELD_OUT, _HELD_OUT_SEED = 15, 1
_BATCH = 8
# Part of the hash; change it with the pictures or the fit.
_RECIPE = "cosmos3-preview-map-1"
_MAX_CACHED = 16
_LEVELS_PER_UNIT = 127.5


@dataclass(frozen=True)
class PreviewError:
    """The error of a map on pictures outside its fit, root mean square in 8-bit levels.

    Attributes:
        rmse_levels: error of the map.
        constant_rmse_levels: error of the best single colour for all pictures, which the map has to beat.
    """

    rmse_levels: float
    constant_rmse_levels: float


def fit_preview_map(vae: VideoVAE) -> PreviewMap:
    """Fit the map from a VAE's latents to the mean colours of their pixels by least squares.

    The same VAE gives the same map, to rounding.

    Raises:
        CapabilityError: the VAE has no encoder, or its latents are not finite.
    """
    latents_PC, colours_PR = [], []
    for pixels_BCFYX in _synthetic_pictures(_NUM_PICTURES, _SEED).split(_BATCH):
        latents_PC.append(_encode(vae, pixels_BCFYX).movedim(1, -1).flatten(0, -2).double().cpu())
        colours_PR.append(_mean_colours(vae, pixels_BCFYX).movedim(1, -1).flatten(0, -2).double())
    latents = torch.cat(latents_PC)
    design = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
    # A driver for rank-deficient systems: channels may be constant, or repeat others.
    *weights, bias = torch.linalg.lstsq(design, torch.cat(colours_PR), driver="gelsd").solution.tolist()
    return _map(weights, bias)


def preview_error(vae: VideoVAE, preview_map: PreviewMap) -> PreviewError:
    """Measure the error of a map on other synthetic pictures of the same kinds.

    Raises:
        CapabilityError: see :func:`fit_preview_map`.
        RequestError: the map is for other latents.
    """
    squares, colours = [], []
    for pixels_BCFYX in _synthetic_pictures(_NUM_HELD_OUT, _HELD_OUT_SEED).split(1):
        levels_THWR = (_mean_colours(vae, pixels_BCFYX)[0].movedim(0, -1) + 1) * _LEVELS_PER_UNIT
        mapped_THWR = preview_map.colours(_encode(vae, pixels_BCFYX)).cpu()
        squares.append((mapped_THWR.double() - levels_THWR).square().flatten())
        colours.append(levels_THWR.flatten(0, -2))
    all_PR = torch.cat(colours)
    constant = (all_PR - all_PR.mean(0)).square().mean()
    return PreviewError(math.sqrt(torch.cat(squares).mean()), math.sqrt(constant))


def load_preview_map(vae: VideoVAE, cache_dir: Path | None) -> PreviewMap:
    """Return a VAE's map from the cache, or fit and cache it.

    A file's name is the hash of everything that the map depends on, every weight of the encoder included. The directory
    is created if missing and keeps the newest 16 maps, of 10 kB each. Failures to read or write are logged.

    Args:
        vae: a VAE with its encoder.
        cache_dir: directory of the maps; None for no cache.

    Raises:
        CapabilityError: see :func:`fit_preview_map`.
    """
    if cache_dir is None:
        return fit_preview_map(vae)
    digest = encoder_digest(vae)
    path = cache_dir / f"preview-map-{digest}.json"
    preview_map = _read(path, digest, vae.config.z_dim)
    if preview_map is None:
        preview_map = fit_preview_map(vae)
        _write(path, digest, preview_map)
    return preview_map


def encoder_digest(vae: VideoVAE) -> str:
    """Return a SHA-256 of everything that decides a VAE's latents: its config, and the encoder's weights as loaded.

    All weights count: two trainings of one model differ nowhere else, and the same file in another dtype is another
    encoder. They are 0.3 GB for the published VAE in bfloat16.

    Raises:
        CapabilityError: the VAE has no encoder.
    """
    if vae.encoder is None:
        raise CapabilityError("preview_map", "a VAE that only decodes", "a VAE with its encoder")
    digest = hashlib.sha256(f"{_RECIPE} {vae.config}".encode())
    for name, parameter in sorted(vae.named_parameters()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            flat = parameter.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, digest: str, num_channels: int) -> PreviewMap | None:
    try:
        stored: Any = json.loads(path.read_bytes())
        if stored["digest"] != digest or len(stored["weights"]) != num_channels:
            raise ValueError("it is another VAE's")
        return _map(stored["weights"], stored["bias"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the preview map %s cannot be used and is fitted anew: %s", path, error)
        return None


def _write(path: Path, digest: str, preview_map: PreviewMap) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        output = OutputFile(path)
        try:
            stored = {"digest": digest, "weights": preview_map.weights, "bias": preview_map.bias}
            output.path.write_text(json.dumps(stored), encoding="utf-8")
            output.commit()
        finally:
            output.discard()
        by_age = sorted(path.parent.glob("preview-map-*.json"), key=lambda it: it.stat().st_mtime_ns)
        for oldest in by_age[:-_MAX_CACHED]:
            oldest.unlink(missing_ok=True)
    except (OSError, MediaError) as error:
        logger.warning("the preview map %s was not kept: %s", path, error)


def _map(weights: list[list[float]], bias: list[float]) -> PreviewMap:
    (red, green, blue), rows = bias, [(red, green, blue) for red, green, blue in weights]
    return PreviewMap(tuple(rows), (red, green, blue))


def _encode(vae: VideoVAE, pixels_BCFYX: Tensor) -> Tensor:
    """Return the latents of pictures, [B, C, 1, H, W] fp32.

    Raises:
        CapabilityError: the latents are not finite.
    """
    latents_BCTHW = vae.encode(pixels_BCFYX).float()
    if not torch.isfinite(latents_BCTHW).all():
        raise CapabilityError("preview_map", "a VAE whose latents are not finite", "a VAE that encodes pictures")
    return latents_BCTHW


def _mean_colours(vae: VideoVAE, pixels_BCFYX: Tensor) -> Tensor:
    """Return the mean colour of each latent position's pixels, [B, 3, 1, H, W] in [-1, 1]."""
    return avg_pool2d(pixels_BCFYX[:, :, 0], vae.geometry.spatial).unsqueeze(2)


# Pictures


def _synthetic_pictures(num_pictures: int, seed: int) -> Tensor:
    """Return pictures [B, 3, 1, Y, X] in [-1, 1], fp32 on the CPU; a seed gives the same ones everywhere."""
    generator = torch.Generator("cpu").manual_seed(seed)
    pictures = [_KINDS[index % len(_KINDS)](generator) for index in range(num_pictures)]
    return torch.stack(pictures).clamp(-1, 1).unsqueeze(2)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers from -1 to 1."""
    return torch.rand(shape, generator=generator, device="cpu") * 2 - 1


def _plane(generator: torch.Generator) -> Tensor:
    """Return [Y, X]: the distance of each pixel along a random direction from a point near the centre."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, _SIDE), torch.linspace(-1, 1, _SIDE), indexing="ij")
    angle, offset = _uniform(generator, 2).tolist()
    return rows * math.sin(math.pi * angle) + columns * math.cos(math.pi * angle) - offset / 2


def _gradient(generator: torch.Generator) -> Tensor:
    start, end = _uniform(generator, 2, 3, 1, 1)
    return start + (end - start) * (_plane(generator) / 2 + 0.5)


def _blobs(generator: torch.Generator) -> Tensor:
    picture = _uniform(generator, 3, 1, 1).expand(3, _SIDE, _SIDE)
    for colour in _uniform(generator, 6, 3, 1, 1):
        squared = _plane(generator).square() + _plane(generator).square()
        cover = torch.exp(-8 * squared)
        picture = picture * (1 - cover) + colour * cover
    return picture


def _smooth_noise(generator: torch.Generator) -> Tensor:
    coarse = _uniform(generator, 1, 3, 5, 5)
    return 1.5 * interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic", align_corners=True)[0]


def _edges(generator: torch.Generator) -> Tensor:
    picture = _uniform(generator, 3, 1, 1).expand(3, _SIDE, _SIDE)
    for colour in _uniform(generator, 4, 3, 1, 1):
        picture = torch.where(_plane(generator) > 0, colour, picture)
    return picture


def _natural(generator: torch.Generator) -> Tensor:
    """Draw noise whose amplitude falls with the frequency, as in photographs; mostly light and dark."""
    frequency = torch.hypot(torch.fft.fftfreq(_SIDE)[:, None], torch.fft.rfftfreq(_SIDE)[None, :])
    frequency[0, 0] = 1.0
    planes = torch.fft.irfft2(torch.fft.rfft2(_uniform(generator, 4, _SIDE, _SIDE)) / frequency)
    planes = planes / planes.std(dim=(1, 2), keepdim=True)
    return 0.5 * _uniform(generator, 3, 1, 1) + 0.35 * planes[:1] + 0.15 * planes[1:]


_KINDS: tuple[Callable[[torch.Generator], Tensor], ...] = (_gradient, _blobs, _smooth_noise, _edges, _natural)
