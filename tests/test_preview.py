"""Previews: the map and how it is fitted, how good it is, where it is kept, when one is due."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import avg_pool2d

from cosmos3_core import preview_fit
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.preview import MAX_PREVIEWS, PreviewMap, PreviewOrder, pick_evenly
from cosmos3_core.preview_fit import encoder_digest, fit_preview_map, load_preview_map, preview_error
from cosmos3_core.shapes import Geometry
from cosmos3_core.vae.video import VideoVAE

MAP = PreviewMap(((0.5, 0.0, 0.0), (0.0, 0.25, -1.0)), (0.1, -0.2, 0.0))


@pytest.fixture(scope="module")
def vae(tiny_nano: Path) -> VideoVAE:
    layout = CheckpointLayout.open(tiny_nano)
    return load_video_vae(layout, device=torch.device("cpu"), dtype=torch.float32)


def test_colours_are_the_linear_map_of_each_position() -> None:
    x0 = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    colours = MAP.colours(x0)
    assert (colours.dtype, tuple(colours.shape)) == (torch.uint8, (3, 4, 5, 3))
    for colour in range(3):
        colour_sum = sum(x0[0, channel] * MAP.weights[channel][colour] for channel in range(2)) + MAP.bias[colour]
        levels = ((colour_sum + 1) * 127.5).clamp(0, 255)
        assert (colours[..., colour] - levels).abs().max() <= 0.51
    assert (MAP.colours(1000 * x0) == MAP.colours(1000 * x0.bfloat16())).float().mean() > 0.9
    assert pickle.loads(pickle.dumps(MAP)) == MAP


@pytest.mark.parametrize("shape", [(1, 3, 1, 4, 4), (2, 2, 1, 4, 4), (2, 1, 4, 4)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"must be \(1, 2, frames, rows, columns\)"):
        MAP.colours(torch.zeros(shape))


@pytest.mark.parametrize("row", [(0.0, 0.0), (0.0, 0.0, float("nan")), (0.0, 0.0, float("inf"))])
def test_a_map_is_of_finite_numbers_three_a_channel(row: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="three finite numbers"):
        PreviewMap((row,), (0.0, 0.0, 0.0))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="three finite numbers"):
        PreviewMap(((0.0, 0.0, 0.0),), row)  # type: ignore[arg-type]


class LinearVAE:
    """Its latents are a fixed mixture of mean colours, roughness and nothing."""

    geometry = Geometry()
    mix = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    def encode(self, pixels_BCFYX: torch.Tensor) -> torch.Tensor:
        pixels = pixels_BCFYX[:, :, 0]
        colours = avg_pool2d(pixels, 16)
        roughness = avg_pool2d(pixels.square(), 16).mean(1, keepdim=True)
        mixed = torch.einsum("bryx,rc->bcyx", colours, self.mix) + 0.3 * roughness
        return torch.cat([mixed, roughness, torch.zeros_like(roughness)], dim=1).unsqueeze(2)


def test_the_map_of_a_linear_vae_is_found_and_tells_other_pictures_to_the_rounding() -> None:
    vae = LinearVAE()
    preview_map = fit_preview_map(vae)  # type: ignore[arg-type]
    assert len(preview_map.weights) == 6
    error = preview_error(vae, preview_map)  # type: ignore[arg-type]
    assert error.rmse_levels < 0.35, "more than rounding to whole levels makes, 0.29"
    assert error.constant_rmse_levels > 40
    # The mixture turned round: a channel's weights undo it, and what the roughness added is taken off.
    weights = torch.tensor(preview_map.weights, dtype=torch.float64)
    assert torch.allclose(LinearVAE.mix.double() @ weights[:4], torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert weights[5].abs().max() < 1e-9


def test_the_map_of_the_tiny_vae_beats_the_mean_colour_on_other_pictures(vae: VideoVAE) -> None:
    """Random weights: all that can be asked. 50.2 levels where the best single colour is off by 63.5."""
    preview_map = fit_preview_map(vae)
    assert preview_map == fit_preview_map(vae)
    error = preview_error(vae, preview_map)
    assert error.rmse_levels < 0.85 * error.constant_rmse_levels
    nothing = PreviewMap(((0.0, 0.0, 0.0),) * len(preview_map.weights), preview_map.bias)
    assert preview_error(vae, nothing).rmse_levels > 0.99 * error.constant_rmse_levels


def test_the_pictures_are_the_same_everywhere_and_those_held_out_are_others() -> None:
    fitted = preview_fit._synthetic_pictures(10, 0)
    assert torch.equal(fitted, preview_fit._synthetic_pictures(10, 0))
    assert tuple(fitted.shape) == (10, 3, 1, 128, 128)
    assert fitted.abs().max() <= 1
    assert min(picture.std() for picture in fitted) > 0.05
    held_out = preview_fit._synthetic_pictures(10, 1)
    assert all(not torch.allclose(one, other) for one in fitted for other in held_out)


def test_vaes_that_encode_nothing_are_refused(tiny_nano: Path) -> None:
    layout = CheckpointLayout.open(tiny_nano)
    decoder = load_video_vae(layout, device=torch.device("cpu"), with_encoder=False)
    for work in (fit_preview_map, encoder_digest):
        with pytest.raises(CapabilityError, match="encode"):
            work(decoder)
    endless = SimpleNamespace(encode=lambda pixels: torch.full((8, 2, 1, 8, 8), torch.inf), geometry=Geometry())
    with pytest.raises(CapabilityError, match="not finite"):
        fit_preview_map(endless)  # type: ignore[arg-type]


def test_a_cached_map_is_read_and_not_fitted_again(
    vae: VideoVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[VideoVAE] = []

    def count(fitted: VideoVAE) -> PreviewMap:
        fits.append(fitted)
        return fit_preview_map(fitted)

    monkeypatch.setattr(preview_fit, "fit_preview_map", count)
    cache = tmp_path / "deep" / "maps"
    first = load_preview_map(vae, cache)
    assert load_preview_map(vae, cache) == first == fit_preview_map(vae)
    assert len(fits) == 1
    assert [path.name for path in cache.iterdir()] == [f"preview-map-{encoder_digest(vae)}.json"]
    load_preview_map(vae, None)
    assert len(fits) == 2, "without a cache each is fitted"


def test_another_vae_never_finds_a_cached_map(vae: VideoVAE) -> None:
    digest = encoder_digest(vae)
    assert encoder_digest(copy.deepcopy(vae)) == digest
    with torch.no_grad():
        other = copy.deepcopy(vae)
        list(other.encoder.parameters())[5].view(-1)[-1] += 1e-3  # type: ignore[union-attr]
        assert encoder_digest(other) != digest
        decoder = copy.deepcopy(vae)
        next(decoder.decoder.parameters()).add_(1)
        assert encoder_digest(decoder) == digest, "the map does not depend on the decoder"
    assert encoder_digest(copy.deepcopy(vae).bfloat16()) != digest
    scaled = copy.deepcopy(vae)
    scaled.config = replace(vae.config, latents_std=tuple(2 * std for std in vae.config.latents_std))
    assert encoder_digest(scaled) != digest


@pytest.mark.parametrize(
    "damage", ["", "{}", "[1]", '{"digest": "x", "weights": [], "bias": []}', "cut", "channel", "text"]
)
def test_a_damaged_file_is_logged_and_replaced(
    damage: str, vae: VideoVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = PreviewMap(((0.5, 0.0, 0.0),) * 48, (0.0, 0.0, 0.0))
    monkeypatch.setattr(preview_fit, "fit_preview_map", lambda vae: fitted)
    load_preview_map(vae, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    stored = json.loads(whole)
    stored["weights"] = stored["weights"][1:] if damage == "channel" else [["a", 0, 0]] * 48
    path.write_text({"cut": whole[:-9], "channel": json.dumps(stored), "text": json.dumps(stored)}.get(damage, damage))
    assert load_preview_map(vae, tmp_path) == fitted
    assert "is fitted anew" in caplog.text
    assert path.read_text() == whole


def test_an_unwritable_cache_is_logged_and_skipped(
    vae: VideoVAE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    assert load_preview_map(vae, tmp_path / "file") == fit_preview_map(vae)
    assert "was not kept" in caplog.text


def test_the_cache_keeps_the_newest_maps_only(vae: VideoVAE, tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"preview-map-{index}.json").write_text("{}")
    (tmp_path / "mine.json").write_text("not a map")
    load_preview_map(vae, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 16 + 1
    assert {"mine.json", f"preview-map-{encoder_digest(vae)}.json"} <= names


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 35, 50, 1000])
@pytest.mark.parametrize("num_previews", [1, 2, 4, 5, MAX_PREVIEWS])
def test_previews_are_no_more_than_asked_for_and_as_many_as_fit(num_previews: int, num_steps: int) -> None:
    period = PreviewOrder(num_previews, 1.0, MAP).period_steps(num_steps)
    due = range(period, num_steps, period)
    assert len(due) <= num_previews
    assert len(due) >= min(num_previews, num_steps - 1) / 2
    assert period >= 1


def test_a_preview_plays_as_long_as_the_clip_but_not_for_minutes() -> None:
    assert PreviewOrder(1, 4.0, MAP).fps(12) == 3.0
    assert PreviewOrder(1, 1200.0, MAP).fps(12) == 1.0


def test_frames_are_picked_evenly() -> None:
    assert pick_evenly(1, 12) == [0]
    assert pick_evenly(12, 12) == list(range(12))
    assert pick_evenly(48, 12) == list(range(0, 48, 4))
    assert pick_evenly(13, 4) == [0, 3, 6, 9]
