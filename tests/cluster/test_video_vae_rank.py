"""A video VAE rank in this process: the preview map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import PreviewFailed
from cluster.video_vae_rank import VideoVAERank, VideoVAESpec
from cosmos3_core import preview_fit
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.preview import PreviewMap
from cosmos3_core.preview_fit import fit_preview_map


@pytest.fixture(scope="module")
def vae(tiny_nano: Path) -> Any:
    return load_video_vae(CheckpointLayout.open(tiny_nano), device=torch.device("cpu"), dtype=torch.float32)


def rank_with(vae: Any, cache_dir: Path | None = None, rank: int = 0) -> VideoVAERank:
    """Make a rank of a gang of two without the other rank."""
    spec = VideoVAESpec("", "cpu", None, 1, 2, preview_cache_dir=None if cache_dir is None else str(cache_dir))
    actor = VideoVAERank(rank, spec)
    actor._loaded_model = vae
    return actor


def test_one_rank_makes_the_map_alone_and_caches_it(vae: Any, tmp_path: Path) -> None:
    preview_map = rank_with(vae, tmp_path).preview_map()
    assert preview_map == fit_preview_map(vae)
    assert len(list(tmp_path.glob("preview-map-*.json"))) == 1
    assert rank_with(vae, tmp_path).preview_map() == preview_map


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nof 1 GiB"), ZeroDivisionError("a bug")])
def test_a_failed_map_leaves_the_rank_working(error: Exception, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(vae: Any) -> Any:
        raise error

    monkeypatch.setattr(preview_fit, "fit_preview_map", fails)
    rank = rank_with(vae)
    name = "OutOfMemory" if isinstance(error, torch.OutOfMemoryError) else "ZeroDivisionError"
    with pytest.raises(PreviewFailed, match=f"^no previews: {name}: ") as raised:
        rank.preview_map()
    assert "\n" not in str(raised.value)
    assert rank._loaded_model is vae


def test_rank_0_has_the_map_when_the_gang_is_warm(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[PreviewMap] = []

    def fit(vae: Any) -> PreviewMap:
        fitted.append(PreviewMap(((0.1, 0.2, 0.3),), (0.0, 0.0, 0.0)))
        return fitted[-1]

    monkeypatch.setattr(preview_fit, "fit_preview_map", fit)
    first, second = (rank_with(vae, rank=rank) for rank in range(2))
    assert ("prepare_previews", ()) in VideoVAESpec("", "cpu", None, 1, 2).warm_up
    for rank in (second, first):
        rank.prepare_previews()
    assert len(fitted) == 1, "one rank's is enough"
    assert first.preview_map() is fitted[0]
    assert first.preview_map() is fitted[0], "made again for a request"


def test_a_failed_map_does_not_stop_the_start(
    vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit = preview_fit.fit_preview_map
    fits = iter([torch.OutOfMemoryError("CUDA out of memory."), None])

    def fails_once(vae: Any) -> PreviewMap:
        if (error := next(fits)) is not None:
            raise error
        return fit(vae)

    monkeypatch.setattr(preview_fit, "fit_preview_map", fails_once)
    rank = rank_with(vae)
    rank.prepare_previews()
    assert "no map of previews yet: OutOfMemory" in caplog.text
    assert rank.preview_map() == fit(vae), "tried again when it is asked for"


def test_a_rank_without_a_model_refuses() -> None:
    with pytest.raises(PreviewFailed, match="before load"):
        rank_with(None).preview_map()
