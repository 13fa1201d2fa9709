"""The video VAE's deployment without Ray: the leader between its gang and a clip's stream."""

from __future__ import annotations

import asyncio
import io
import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.clip_stream import ClipStreams
from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded, GangFailed, GangLost
from cluster.gang import Gang, GangSpec
from cluster.video_vae_rank import ChunkStrip
from cosmos3_core.conditioning.modes import Resizing
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.media.image import write_image
from deployments.messages import ChunkDecoded, FrameChunk, PictureEncoded, RequestContext
from deployments.stages.audio_vae import _next_samples
from deployments.stages.video_vae import CallLimits, VideoVAEDeployment
from tests.serve_fakes import Handle
from tests.settling import run, settle

LIMITS = CallLimits(first_timeout_s=20, timeout_s=10)


class FakeGang:
    """Two ranks, each with one row of every frame."""

    def __init__(self, num_chunks: int = 3) -> None:
        self.num_chunks = num_chunks
        self.calls: list[tuple[str, Any, float]] = []
        self.failure: Exception | None = None
        self.is_stopped = False

    async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        self.calls.append((method, arguments[0], timeout_s))
        if self.failure is not None:
            raise self.failure
        if method == "encode":
            return [TensorEnvelope.of_array(np.zeros((1, 2, 3, 4, 5), np.float32)), None]
        if method != "next_strip":
            return [None, None]
        number = self.methods.count("next_strip") - 1
        if number == self.num_chunks:
            return [None, None]
        return [
            ChunkStrip(TensorEnvelope.of_array(np.full((4, 1, 6, 3), 2 * number + r, np.uint8)), 1, r) for r in range(2)
        ]

    @property
    def methods(self) -> list[str]:
        return [method for method, *_ in self.calls]

    def stop(self) -> None:
        self.is_stopped = True


async def leader_of(gang: FakeGang, monkeypatch: pytest.MonkeyPatch) -> Any:
    async def start(spec: GangSpec) -> FakeGang:
        return gang

    monkeypatch.setattr(Gang, "start", start)
    leader = cast(Any, VideoVAEDeployment).__new__(VideoVAEDeployment)
    await leader.__init__(cast(GangSpec, None), LIMITS)
    return leader


async def decode(leader: Any, limit_s: float = 20, most: float = math.inf) -> list[Any]:
    clips, items = ClipStreams(1), []
    await clips.open("clip", window=8)
    latents = TensorEnvelope.of_array(np.zeros((1, 2, 3, 4, 5), np.float32))
    stream = leader.decode(RequestContext.new("r", limit_s), latents, Handle(clips), "clip", "video/1")
    async for item in stream:
        items.append(item)
        if len(items) >= most:
            await stream.aclose()
            break
    return items


def test_a_clips_chunks_are_the_ranks_strips_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        gang = FakeGang()
        items = await decode(await leader_of(gang, monkeypatch))
        assert [type(item) for item in items] == [FrameChunk, ChunkDecoded] * 3
        assert [item.index for item in items] == [0, 0, 1, 1, 2, 2]
        for number, chunk in enumerate(items[::2]):
            frames = chunk.frames()
            assert frames.shape == (4, 2, 6, 3)
            assert frames[0, :, 0, 0].tolist() == [2 * number, 2 * number + 1]
        await settle()
        assert gang.methods == ["begin", *["next_strip"] * 4, "end"]
        assert {name for _, name, _ in gang.calls} == {"clip/video/1"}
        # With a new size the first two chunks compile; the second has the shape of all later ones.
        assert [timeout_s for *_, timeout_s in gang.calls] == [10, 20, 20, 10, 10, 10]

    run(body())


def test_leaving_a_clip_notifies_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        gang = FakeGang(num_chunks=100)
        await decode(await leader_of(gang, monkeypatch), most=2)
        await settle()
        assert gang.methods[-1] == "end"
        assert not gang.is_stopped

    run(body())


def test_a_failed_gang_raises_and_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        gang = FakeGang()
        leader = await leader_of(gang, monkeypatch)
        # A dead rank ends this process after its errors are sent.
        monkeypatch.setattr("deployments.threads._GRACE_S", 1000.0)
        await leader.check_health()
        gang.failure = GangFailed("decode", "died", 1)
        with pytest.raises(GangFailed, match="rank 1"):
            await decode(leader)
        assert gang.is_stopped
        with pytest.raises(GangFailed):
            await leader.check_health()

    run(body())


def test_a_clip_that_waits_for_a_credit_fails_with_its_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        gang, clips = FakeGang(num_chunks=100), ClipStreams(1)
        leader = await leader_of(gang, monkeypatch)
        monkeypatch.setattr("deployments.threads._GRACE_S", 1000.0)
        await clips.open("clip", window=1)
        latents = TensorEnvelope.of_array(np.zeros((1, 2, 3, 4, 5), np.float32))
        stream = leader.decode(RequestContext.new("r", 20), latents, Handle(clips), "clip", "video/1")
        assert {type(await anext(stream)) for _ in range(2)} == {ChunkDecoded, FrameChunk}
        waiting = asyncio.create_task(anext(stream))
        await settle()
        assert not waiting.done()
        gang.failure = GangFailed("decode", "died", 1)
        with pytest.raises(GangFailed) as blamed:
            await decode(leader)
        assert type(blamed.value) is GangFailed
        with pytest.raises(GangLost):
            await asyncio.wait_for(waiting, 10)

    run(body())


def test_a_requests_deadline_ends_its_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        leader = await leader_of(FakeGang(), monkeypatch)
        with pytest.raises(DeadlineExceeded, match="decode"):
            await decode(leader, limit_s=0.0)

    run(body())


def picture(media: bytes) -> PictureCondition:
    return PictureCondition("image", media, Resizing.CROP, 32, 48, 0, 1, "first", (0,))


def test_a_picture_is_read_by_the_leader_and_encoded_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    write_image(stream, np.zeros((32, 48, 3), np.uint8), "png")

    async def body() -> None:
        gang = FakeGang()
        leader = await leader_of(gang, monkeypatch)
        items = [item async for item in leader.encode(RequestContext.new("r", 20), picture(stream.getvalue()))]
        assert isinstance(items[0], PictureEncoded)
        assert items[0].num_latent_frames == 3
        assert items[1].shape == (1, 2, 3, 4, 5)
        ((method, sent, timeout_s),) = gang.calls
        assert (method, timeout_s) == ("encode", 20)
        assert sent.media == b"", "the ranks get pixels, not the caller's file"
        with pytest.raises(Cosmos3Error, match="image"):
            [item async for item in leader.encode(RequestContext.new("r", 20), picture(b"no picture"))]
        assert len(gang.calls) == 1, "what cannot be read never reaches the ranks"

    run(body())


def test_samples_come_as_floats_and_end_with_none() -> None:
    source = iter([torch.full((2, 7), 0.5)])
    samples = _next_samples(source)
    assert samples is not None
    assert (samples.shape, samples.dtype) == ((2, 7), "float32")
    assert _next_samples(source) is None
