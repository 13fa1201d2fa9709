"""A gang of video VAE ranks, two processes without Ray: strips side by side are what one rank decodes."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.envelope import TensorEnvelope
from cluster.errors import OutOfMemory
from cluster.video_vae_rank import VideoVAERank, VideoVAESpec
from cosmos3_core.conditioning.modes import Resizing
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.groups import close_groups, host_store

Calls = list[tuple[str, tuple[Any, ...]]]

# Latent frames, rows, columns: of five columns, or rows, ranks have three and two; one position is not cut.
CLIPS = {"columns": (3, 3, 5), "rows": (2, 5, 3), "whole": (2, 1, 1)}
PICTURE = PictureCondition("image", b"", Resizing.CROP, 32, 48, 0, 1, "first", (0,))


def spec_of(checkpoint: Path, ranks: int) -> VideoVAESpec:
    return VideoVAESpec(str(checkpoint), "cpu", None, 1, ranks, collective_timeout_s=60)


def latents_of(name: str) -> TensorEnvelope:
    noise = np.random.default_rng(len(name)).normal(size=(1, 48, *CLIPS[name]))
    return TensorEnvelope.of_array(noise.astype(np.float32))


def list_calls(spec: VideoVAESpec) -> Calls:
    """List a leader's calls to every rank: warm up, the clips in turns, a picture."""
    calls = [*spec.warm_up, *(("begin", (name, latents_of(name))) for name in CLIPS)]
    longest = max(num_frames for num_frames, *_ in CLIPS.values())
    calls += [("next_strip", (name,)) for _ in range(longest + 1) for name in CLIPS]
    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3), dtype=np.uint8)
    return [*calls, ("encode", (PICTURE, TensorEnvelope.of_array(picture))), *(("end", (name,)) for name in CLIPS)]


def run_rank(rank: int, spec: VideoVAESpec, port: int) -> list[Any]:
    """Run a rank through all calls; return its answers."""
    actor = VideoVAERank(rank, spec)
    if spec.num_ranks > 1:
        actor.join("127.0.0.1", port)
    actor.load()
    results = [getattr(actor, method)(*arguments) for method, arguments in list_calls(spec)]
    assert actor._clips == {}
    close_groups()
    return results


def strips(spec: VideoVAESpec, results: list[Any]) -> dict[str, list[Any]]:
    """Group the answers by clip; the last of each is None."""
    found: dict[str, list[Any]] = {name: [] for name in CLIPS}
    for (method, arguments), result in zip(list_calls(spec), results, strict=True):
        if method == "next_strip" and arguments[0] in CLIPS:
            found[arguments[0]].append(result)
    return found


def latents_from(spec: VideoVAESpec, results: list[Any]) -> Any:
    return results[[method for method, _ in list_calls(spec)].index("encode")]


def join_strips(chunks: list[Any]) -> npt.NDArray[np.int64]:
    """Join the strips of a clip's chunks as :class:`FrameChunk` does."""
    return np.concatenate(
        [np.concatenate([strip.frames.array() for strip in chunk], chunk[0].axis) for chunk in chunks]
    ).astype(np.int64)


@pytest.mark.gang
@pytest.mark.timeout(120)
def test_two_ranks_give_the_result_of_one(tiny_nano: Path) -> None:
    alone, together = spec_of(tiny_nano, 1), spec_of(tiny_nano, 2)
    expected = run_rank(0, alone, 0)
    store = host_store("127.0.0.1", 2, 60)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        futures = [processes.submit(run_rank, rank, together, store.port) for rank in range(2)]
        ranks = [future.result(timeout=100) for future in futures]
    shares = {"columns": (2, [48, 32]), "rows": (1, [48, 32]), "whole": (1, [16, 0])}
    for name, (num_frames, height, width) in CLIPS.items():
        whole, *halves = (
            [chunk for chunk in strips(spec, results)[name] if chunk is not None]
            for spec, results in ((alone, expected), *((together, rank) for rank in ranks))
        )
        assert [len(chunks) for chunks in (whole, *halves)] == [num_frames] * 3
        axis, extents = shares[name]
        for half, extent in zip(halves, extents, strict=True):
            assert {(strip.axis, strip.frames.shape[axis]) for strip in half} == {(axis, extent)}
        frames = join_strips(list(zip(*halves, strict=True)))
        assert frames.shape == (4 * num_frames - 3, 16 * height, 16 * width, 3)
        assert frames.std() > 5, "pictures this flat would prove little"
        assert abs(frames - join_strips([[chunk] for chunk in whole])).max() <= 1
    first, second = (latents_from(together, rank) for rank in ranks)
    assert second is None
    np.testing.assert_allclose(first.array(), latents_from(alone, expected).array(), rtol=0, atol=1e-5)


def test_latents_of_another_shape_are_refused_by_every_rank(tiny_nano: Path) -> None:
    rank = VideoVAERank(0, spec_of(tiny_nano, 1))
    rank.load()
    with pytest.raises(RequestError, match="48, frames, rows, columns"):
        rank.begin("clip", TensorEnvelope.of_array(np.zeros((1, 7, 2, 2, 2), np.float32)))
    assert rank._clips == {}


def test_a_clip_out_of_memory_is_dropped(tiny_nano: Path) -> None:
    rank = VideoVAERank(0, spec_of(tiny_nano, 1))
    rank.load()
    rank.begin("clip", latents_of("rows"))

    def too_large(*_: Any) -> Any:
        raise MemoryError("no memory")

    assert rank._model is not None
    rank._model.decoder.register_forward_pre_hook(too_large)
    with pytest.raises(OutOfMemory, match="no memory"):
        rank.next_strip("clip")
    assert rank._clips == {}


def test_a_spec_survives_pickling(tiny_nano: Path) -> None:
    spec = spec_of(tiny_nano, 4)
    assert pickle.loads(pickle.dumps(spec)) == spec
    (begin, (_, latents)), *_ = spec.warm_up
    assert (begin, latents.shape) == ("begin", (1, 48, 2, 1, 4))
