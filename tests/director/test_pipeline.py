"""A request's pipeline with fake stages: order, retries, deadlines, ends. Without Ray."""

from __future__ import annotations

import asyncio
import gc
import pickle
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from cluster.clip_stream import ClipStreams
from cluster.envelope import TensorEnvelope
from cluster.errors import (
    DeadlineExceeded,
    GangFailed,
    GangLost,
    OverloadedError,
    PreviewFailed,
    StageFailed,
    StreamClosed,
)
from cluster.events import PreviewReady, PreviewsOff, StepDone
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import RequestError
from cosmos3_core.preview import PreviewMap, PreviewOrder
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import resolve
from deployments import messages
from deployments.config import DirectorStage
from deployments.director import pipeline as pipeline_module
from deployments.director.clip_pipeline import merge
from deployments.director.pipeline import Pipeline
from deployments.director.resources import PipelineResources
from deployments.errors import MediaStoreError
from deployments.messages import RequestContext
from deployments.stages.handles import StageHandles
from deployments.stages.streams import RefStream
from tests import serve_fakes
from tests.serve_fakes import Method, Ref, Response
from tests.settling import run, settle, until
from tests.virtual_time import set_clocks


class FakeMedia:
    """A media store that records the fate of its files."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.failed: dict[str, str] = {}
        self.is_shared = True

    def require(self, media_id: str) -> None:
        assert media_id in self.begun
        if not self.is_shared:
            raise MediaStoreError("not to be seen here")

    def fail(self, media_id: str, reason: str) -> None:
        self.failed[media_id] = reason


class FakeStages:
    """Four trivial stages; each can fail a given number of times."""

    def __init__(self, num_chunks: int = 5) -> None:
        self.num_chunks = num_chunks
        self.failures: dict[str, list[BaseException]] = {}
        self.saves = self.loses = self.misses = False
        self.is_full = False
        self.resumed_from: list[Any] = []
        self.clips = ClipStreams(8)
        self.media = FakeMedia()
        self.tokenize, self.denoise = Method(self._tokenize), Method(self._denoise)
        self.encode_picture = Method(self._encode_picture)
        self.tokenized: list[Any] = []
        self.decode, self.encode = Method(self._decode), Method(self._encode)
        self.clean: list[Any] = []
        self.previews: list[Any] = []
        self.preview: PreviewReady | None = None
        self.request_has_pictures = True
        self.post, self.complete = Method(self.clips.post), Method(self.clips.complete)
        self.open, self.return_credit = Method(self.clips.open), Method(self.clips.return_credit)
        self.forget_producer = Method(self.clips.forget_producer)
        self.encoded: list[str] = []
        self.decoded = 0

    async def has_no_clip_open(self) -> bool:
        return await self.clips.num_open() == 0

    def fail(self, stage: str) -> None:
        if self.failures.get(stage):
            raise self.failures[stage].pop(0)

    async def _tokenize(self, context: RequestContext, request: Any) -> messages.TokenizedPair:
        self.fail("tokenize")
        self.tokenized.append(request)
        return messages.TokenizedPair((1, 2), (3,), "given", 11)

    async def _denoise(
        self, context: RequestContext, job: Any, saved: Any, clean: Any, previews: Any
    ) -> AsyncIterator[Any]:
        self.previews.append(previews)
        self.resumed_from.append(saved and saved.value)
        self.clean.append(clean and clean.value)
        if self.misses and saved is not None:
            self.misses = False
            raise ObjectLostError("00", None, "")
        if self.is_full:
            raise OverloadedError("requests", 1, 1.0)
        yield StepDone(1, 2, 0.5, 0.1, 12)
        if self.preview is not None:
            yield self.preview
        if self.saves:
            yield messages.StateSaved(1, 5, 13)
            yield f"state of try {context.attempt}"
        if self.loses:
            self.loses = False
            yield messages.StateSaved(2, 5, 13)
            raise ObjectLostError("00", None, "")
        self.fail("denoise")
        yield messages.LatentsReady(0.1, ("video",), 13, (12,))
        yield "latents"

    async def _encode_picture(self, context: RequestContext, picture: Any) -> AsyncIterator[Any]:
        assert len(picture.media) > 0
        self.fail("condition")
        yield messages.PictureEncoded(0.1, 1, 14)
        yield f"clean latents of try {context.attempt}"

    async def _decode(
        self, context: RequestContext, latents: Any, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[Any]:
        assert latents.value == "latents"
        for index in range(self.num_chunks):
            assert await self.clips.acquire(stream_id, producer, 10)
            if index == 2:
                self.fail("decode")
            self.decoded += 1
            yield f"chunk {index}"
            if index == 3:
                self.fail("decode's word")
            yield messages.ChunkDecoded(index, time.time(), 1)

    async def _encode(
        self, context: RequestContext, form: Any, media_id: str, clips: Any, stream_id: str
    ) -> AsyncIterator[Any]:
        self.media.begun.append(media_id)
        yield messages.FileStarted(media_id, "video/mp4", 15)
        taken = 0
        while boxed := await self.clips.take(stream_id, 10):
            self.encoded.append(await boxed[0])
            assert self.encoded[-1] == f"chunk {taken}"
            if taken == 1:
                self.fail("encode")
            yield messages.ChunkEncoded(taken, 1, 14, time.time(), 15)
            taken += 1
            await self.clips.release_chunk(stream_id)
        yield messages.ClipEncoded(media_id, "hash", taken, 6, 0.1, 15)

    def pipeline(self, tiny: Path, *, limit_s: float = 30, max_attempts: int = 3, **fields: Any) -> Pipeline:
        layout = CheckpointLayout.open(tiny)
        small = {"num_frames": 17, "height": 32, "width": 32, "num_inference_steps": 2}
        request = GenerationRequest(**{"prompt": "a", **({} if "mode" in fields else small), **fields})
        resources = PipelineResources(
            layout=layout,
            stages=StageHandles(self, self, SimpleNamespace(decode=self.decode, encode=self.encode_picture), self),
            clips=self,
            media=self.media,  # type: ignore[arg-type]
            config=DirectorStage(chunk_window=2, max_attempts=max_attempts),
            close_later=lambda _, stream_id: asyncio.get_running_loop().create_task(
                self.clips.close(stream_id, "ended")
            ),
            previews=None,  # type: ignore[arg-type]
        )
        return Pipeline(resources, resolve(request, layout), RequestContext.new("r", limit_s))


def set_handles(pipeline: Pipeline, **handles: Any) -> None:
    """Replace some of a pipeline's stages."""
    stages = replace(pipeline.resources.stages, **handles)
    pipeline.resources = replace(pipeline.resources, stages=stages)


def set_order_of_previews(pipeline: Pipeline, order: Callable[[int, float], Any]) -> None:
    """Let a pipeline order three previews."""
    previews: Any = SimpleNamespace(order=order)
    pipeline.num_previews, pipeline.resources = 3, replace(pipeline.resources, previews=previews)


async def collect(pipeline: Pipeline) -> list[Any]:
    return [event async for event in pipeline.events()]


def kinds(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_pipeline_runs_every_stage_in_order(tiny_nano: Path) -> None:
    stages = FakeStages()
    events = run(collect(stages.pipeline(tiny_nano)))
    assert kinds(events)[:4] == ["Tokenized", "StepDone", "LatentsReady", "FileStarted"]
    assert kinds(events)[-2:] == ["ClipEncoded", "Finished"]
    assert [events[-1].media_id] == stages.media.begun
    assert stages.media.failed == {}
    assert [event.index for event in events if isinstance(event, messages.ChunkDecoded)] == list(range(5))
    assert [event.chunk for event in events if isinstance(event, messages.ChunkEncoded)] == list(range(5))
    finished = events[-1]
    assert set(finished.stage_seconds) == {"tokenize", "denoise", "decode_encode", "encode", "total"}
    assert all(method.responses[0].is_cancelled for method in (stages.denoise, stages.decode, stages.encode))


IMAGE = np.zeros((32, 32, 3), np.uint8)


def test_a_given_picture_is_encoded_once_for_all_attempts(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["condition"] = [GangFailed("step", "died")]
    stages.failures["denoise"] = [GangFailed("step", "died")]
    pipeline = stages.pipeline(tiny_nano, image=IMAGE)
    events = run(collect(pipeline))
    assert kinds(events)[:3] == ["Tokenized", "StageRetried", "PictureEncoded"]
    assert stages.clean == ["clean latents of try 2"] * 2
    assert len(stages.encode_picture.responses) == 2
    assert all(response.is_cancelled for response in stages.encode_picture.responses)
    assert [request.picture for request in stages.tokenized] == [None], "prompts need no picture"
    assert pipeline.request.picture is not None
    assert pipeline.request.picture.media == b"", "the caller's file was kept"
    assert events[-1].stage_seconds["condition"] == 0.1
    assert stages.pipeline(tiny_nano).request.picture is None


def test_a_damaged_picture_is_not_retried(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["condition"] = [RequestError("image", "bytes", "an image")]
    with pytest.raises(RequestError, match="image must be .*bytes"):
        run(collect(stages.pipeline(tiny_nano, image=IMAGE)))
    assert stages.denoise.responses == []


PREVIEW_MAP = PreviewMap(((0.0, 0.0, 0.0),), (0.0, 0.0, 0.0))


def test_previews_are_requested_in_every_attempt_and_come_with_the_steps(tiny_nano: Path) -> None:
    async def order(num_previews: int, duration_s: float) -> PreviewOrder:
        return PreviewOrder(num_previews, duration_s, PREVIEW_MAP)

    stages = FakeStages()
    stages.failures["denoise"] = [GangFailed("step", "died")]
    stages.preview = PreviewReady(1, 0.5, "image/webp", b"RIFF", 13)
    pipeline = stages.pipeline(tiny_nano, fps=8.0)
    set_order_of_previews(pipeline, order)
    events = run(collect(pipeline))
    assert stages.previews == [PreviewOrder(3, 17 / 8, PREVIEW_MAP)] * 2
    assert kinds(events)[1:7] == [
        "StepDone",
        "PreviewReady",
        "StageRetried",
        "StepDone",
        "PreviewReady",
        "LatentsReady",
    ]
    assert events[2] == stages.preview


@pytest.mark.parametrize(
    ("fields", "reason"), [({}, "the VAE is away"), ({"generate_sound": True, "output": "wav"}, "makes no pictures")]
)
def test_unavailable_previews_are_reported_and_the_request_goes_on(
    fields: dict[str, Any], reason: str, tiny_nano: Path
) -> None:
    async def order(num_previews: int, duration_s: float) -> PreviewOrder:
        raise PreviewFailed("the VAE is away")

    stages = FakeSound() if fields else FakeStages()
    stages.request_has_pictures = False
    pipeline = stages.pipeline(tiny_nano, **fields)
    set_handles(pipeline, audio=getattr(stages, "audio", None))
    set_order_of_previews(pipeline, order)
    events = run(collect(pipeline))
    (off,) = [event for event in events if isinstance(event, PreviewsOff)]
    assert reason in off.reason
    assert events.index(off) < kinds(events).index("LatentsReady")
    assert stages.previews == [None]
    assert kinds(events).count("Finished") == 1


def test_no_previews_are_made_unless_requested(tiny_nano: Path) -> None:
    stages = FakeStages()
    events = run(collect(stages.pipeline(tiny_nano)))
    assert stages.previews == [None]
    assert not {"PreviewReady", "PreviewsOff"} & set(kinds(events))


class FakeSound(FakeStages):
    """StageHandles that denoise sound too; its decoder waits until the last frame is decoded."""

    def __init__(self) -> None:
        super().__init__(num_chunks=2)
        self.denoise = Method(self._denoise_both)
        self.encode = Method(self._encode_both)
        self.audio = SimpleNamespace(decode=Method(self._decode_sound))
        self.taken: list[str] = []

    async def _denoise_both(self, context: Any, job: Any, saved: Any, clean: Any, previews: Any) -> AsyncIterator[Any]:
        assert job.num_sound_latents > 0
        self.previews.append(previews)
        yield messages.LatentsReady(0.1, ("video", "sound"), 13, (12,))
        yield "latents"
        yield "sound latents"

    async def _decode_sound(
        self, context: Any, latents: Any, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[Any]:
        assert latents.value == "sound latents"
        while self.request_has_pictures and self.decoded < self.num_chunks:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert await self.clips.acquire(stream_id, producer, 10)
        self.fail("sound")
        yield "samples"
        yield messages.SoundDecoded(0, time.time(), 2)

    async def _encode_both(
        self, context: Any, form: Any, media_id: str, clips: Any, stream_id: str
    ) -> AsyncIterator[Any]:
        self.media.begun.append(media_id)
        yield messages.FileStarted(media_id, "video/mp4", 15)
        while boxed := await self.clips.take(stream_id, 10):
            self.taken.append(await boxed[0])
            await self.clips.release_chunk(stream_id)
        yield messages.ClipEncoded(media_id, "hash", 2, 3, 0.1, 15)


def test_sound_is_decoded_beside_the_frames_and_waited_for(tiny_nano: Path) -> None:
    stages = FakeSound()
    pipeline = stages.pipeline(tiny_nano, generate_sound=True)
    set_handles(pipeline, audio=stages.audio)
    events = run(collect(pipeline))
    assert stages.taken == ["chunk 0", "chunk 1", "samples"]
    assert "SoundDecoded" in kinds(events)
    assert all(response.is_cancelled for response in stages.audio.decode.responses)


@pytest.mark.parametrize("where", ["decode", "decode's word"])
def test_a_decoder_that_dies_leaves_the_file_and_its_encoder_alone(where: str, tiny_nano: Path) -> None:
    """Another decoder starts over; chunks that the encoder already has are dropped, and no credit is lost."""
    stages = FakeStages(num_chunks=6)
    stages.failures[where] = [GangFailed("decode", "died")] * 2
    pipeline = stages.pipeline(tiny_nano)
    events = run(collect(pipeline))
    assert stages.encoded == [f"chunk {index}" for index in range(6)]
    assert len(stages.encode.responses) == 1
    assert len(stages.decode.responses) == 3
    assert kinds(events).count("FileStarted") == 1
    assert [event.index for event in events if isinstance(event, messages.ChunkDecoded)] == list(range(6))
    assert [event.stage for event in events if isinstance(event, messages.StageRetried)] == ["decode"] * 2
    assert stages.media.failed == {}


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_clip_that_kills_every_decoder_uses_up_the_decoders_attempts(max_attempts: int, tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["decode"] = [GangFailed("decode", "died", 1) for _ in range(20)]
    pipeline = stages.pipeline(tiny_nano, max_attempts=max_attempts)
    with pytest.raises(StageFailed, match=rf"'decode'.*{max_attempts}.*GangFailed.*rank 1"):
        run(collect(pipeline))
    assert len(stages.decode.responses) == max_attempts
    assert len(stages.encode.responses) == 1
    assert list(stages.media.failed) == stages.media.begun


def test_a_dropped_chunk_is_freed_before_its_credit_returns(tiny_nano: Path) -> None:
    """A credit stands for the memory of a chunk."""
    stages = FakeStages(num_chunks=4)
    stages.failures["decode"] = [GangFailed("decode", "died")]
    refs: list[weakref.ref[Any]] = []
    return_credit = stages.clips.return_credit

    async def dropping(stream_id: str, producer: str) -> None:
        gc.collect()
        assert [ref() for ref in refs if ref() is not None and ref().value == "chunk 0"] == []
        dropped.append(producer)
        await return_credit(stream_id, producer)

    class NotedRef(Ref):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            refs.append(weakref.ref(self))

    dropped: list[str] = []
    stages.return_credit = Method(dropping)
    with mock.patch.object(serve_fakes, "Ref", NotedRef):
        run(collect(stages.pipeline(tiny_nano)))
    assert dropped == ["video/2"] * 2


def test_a_source_waits_for_its_consumer() -> None:
    made = 0

    async def source() -> AsyncIterator[int]:
        nonlocal made
        for made in range(1, 101):
            yield made

    async def body() -> None:
        items = merge(source())
        assert await anext(items) == 1
        await settle()
        assert made < 25
        assert [item async for item in items] == list(range(2, 101))

    run(body())


def test_an_encoders_death_makes_a_new_file(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["encode"] = [GangFailed("encode", "died")]
    events = run(collect(stages.pipeline(tiny_nano)))
    started = [event.media_id for event in events if isinstance(event, messages.FileStarted)]
    assert started == stages.media.begun
    assert len(set(started)) == 2
    assert list(stages.media.failed) == started[:1]
    assert "died" in stages.media.failed[started[0]]
    assert next(event for event in events if isinstance(event, messages.Finished)).media_id == started[1]
    order = [kind for kind in kinds(events) if kind in ("FileStarted", "StageRetried")]
    assert order == ["FileStarted", "StageRetried", "FileStarted"]


def test_a_media_store_that_is_not_shared_is_a_clear_error(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.media.is_shared = False
    with pytest.raises(MediaStoreError, match="not to be seen here"):
        run(collect(stages.pipeline(tiny_nano)))
    assert stages.decode.responses == []


def test_a_sound_file_decodes_no_frames(tiny_nano: Path) -> None:
    stages = FakeSound()
    stages.request_has_pictures = False
    pipeline = stages.pipeline(tiny_nano, generate_sound=True, output="wav")
    set_handles(pipeline, audio=stages.audio)
    events = run(collect(pipeline))
    assert stages.taken == ["samples"]
    assert stages.decode.responses == []
    assert next(event for event in events if isinstance(event, messages.Finished)).media_type == "audio/wav"


def test_an_audio_decoders_death_is_retried_without_the_frames(tiny_nano: Path) -> None:
    stages = FakeSound()
    stages.failures["sound"] = [GangFailed("step", "died")]
    pipeline = stages.pipeline(tiny_nano, generate_sound=True)
    set_handles(pipeline, audio=stages.audio)
    events = run(collect(pipeline))
    assert kinds(events).count("StageRetried") == 1
    assert stages.taken == ["chunk 0", "chunk 1", "samples"]
    assert kinds(events).count("Finished") == 1


def test_actions_alone_need_no_decoder(tiny_nano: Path) -> None:
    stages = FakeStages()
    actions = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)

    async def denoise(context: Any, job: Any, saved: Any, clean: Any, previews: Any) -> AsyncIterator[Any]:
        assert clean.value == "clean latents of try 1"
        yield messages.LatentsReady(0.1, ("video", "action"), 13, (12,))
        yield "latents"
        yield TensorEnvelope.of_array(actions)

    stages.denoise = Method(denoise)
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    pipeline = stages.pipeline(tiny_nano, mode="inverse_dynamics", video=clip, domain_name="av", action_chunk_size=8)
    events = run(collect(pipeline))
    assert kinds(events)[-2:] == ["LatentsReady", "Finished"]
    finished = events[-1]
    assert (finished.media_type, finished.num_bytes, finished.num_frames) == ("", 0, 0)
    assert np.array_equal(finished.actions.values, actions[:, :9])
    assert stages.decode.responses == stages.encode.responses == []


@pytest.mark.parametrize("stage", ["tokenize", "denoise", "decode", "encode"])
def test_a_death_is_retried_without_repeated_events(stage: str, tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures[stage] = [GangFailed("step", "died"), GangFailed("step", "died again")]
    events = run(collect(stages.pipeline(tiny_nano)))
    retried = [event for event in events if isinstance(event, messages.StageRetried)]
    assert [event.attempt for event in retried] == [2, 3]
    assert "died" in retried[0].reason
    assert kinds(events).count("Finished") == 1
    assert list(stages.media.failed) == stages.media.begun[:-1], "files of encoders that died"


@pytest.mark.parametrize("stage", ["tokenize", "denoise", "decode", "encode"])
def test_attempts_are_bounded(stage: str, tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures[stage] = [StreamClosed("r/1", "died")] * 9
    with pytest.raises(StageFailed) as caught:
        run(collect(stages.pipeline(tiny_nano)))
    assert caught.value.attempts == 3
    assert len(stages.failures[stage]) == 6


def test_after_the_last_attempt_the_gangs_failure_is_raised(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["denoise"] = [GangFailed("step", "died", rank) for rank in range(9)]
    with pytest.raises(GangFailed) as caught:
        run(collect(stages.pipeline(tiny_nano)))
    assert (caught.value.phase, caught.value.rank) == ("step", 2)


def test_denoising_resumes_from_the_last_saved_state(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.saves = True
    stages.failures["denoise"] = [GangFailed("step", "died"), GangFailed("step", "died")]
    events = run(collect(stages.pipeline(tiny_nano)))
    assert stages.resumed_from == [None, "state of try 1", "state of try 2"]
    assert [event.from_step for event in events if isinstance(event, messages.StageRetried)] == [1, 1]


def test_a_lost_state_restarts_denoising(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.saves = stages.misses = True
    stages.failures["denoise"] = [GangFailed("step", "died")]
    events = run(collect(stages.pipeline(tiny_nano)))
    assert stages.resumed_from == [None, "state of try 1", None]
    assert [event.from_step for event in events if isinstance(event, messages.StageRetried)] == [1, 0]


def test_losing_a_newer_state_leaves_the_older_one(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.saves = stages.loses = True
    events = run(collect(stages.pipeline(tiny_nano)))
    assert stages.resumed_from == [None, "state of try 1"]
    assert [event.from_step for event in events if isinstance(event, messages.StageRetried)] == [1]


@pytest.mark.parametrize(("guidance_scale", "expected"), [(1.0, "unguided"), (6.0, "transformer")])
@pytest.mark.parametrize("is_full", [False, True])
def test_requests_prefer_their_kind_of_gang_and_use_the_other_if_it_is_full(
    guidance_scale: float, expected: str, is_full: bool, tiny_nano: Path
) -> None:
    gangs = {"transformer": FakeStages(), "unguided": FakeStages()}
    gangs[expected].is_full = is_full
    pipeline = gangs["transformer"].pipeline(tiny_nano)
    pipeline.request = replace(pipeline.request, guidance_scale=guidance_scale)
    set_handles(pipeline, unguided=gangs["unguided"])
    events = run(collect(pipeline))
    assert kinds(events).count("Finished") == 1
    assert "StageRetried" not in kinds(events)
    other = next(name for name in gangs if name != expected)
    assert len(gangs[expected].denoise.responses) == 1
    assert len(gangs[other].denoise.responses) == int(is_full)


def test_without_a_gang_of_its_kind_a_request_uses_the_other(tiny_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, away = FakeStages(), FakeStages()

    async def never(*arguments: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(1000)
        yield None

    away.denoise = Method(never)
    monkeypatch.setattr(pipeline_module, "_FIRST_ANSWER_S", 0.1)
    pipeline = stages.pipeline(tiny_nano)
    pipeline.request = replace(pipeline.request, guidance_scale=1.0)
    set_handles(pipeline, unguided=away)
    events = run(collect(pipeline))
    assert kinds(events).count("Finished") == 1
    assert away.denoise.responses[0].is_cancelled


def test_an_accepted_request_waits_where_all_gangs_are_full(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.is_full = True

    async def body() -> None:
        pipeline = asyncio.create_task(collect(stages.pipeline(tiny_nano)))
        while len(stages.denoise.responses) < 2:
            await asyncio.sleep(0.01)
        stages.is_full = False
        events = await pipeline
        assert kinds(events).count("Finished") == 1
        assert "StageRetried" not in kinds(events), "waiting is no failure"

    run(body())
    stages.is_full = True
    with pytest.raises(DeadlineExceeded):
        run(collect(stages.pipeline(tiny_nano, limit_s=0.5)))


def test_another_requests_failure_is_not_counted_as_an_attempt(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["denoise"] = [GangLost("step", "died")] * 5
    events = run(collect(stages.pipeline(tiny_nano)))
    assert [event.attempt for event in events if isinstance(event, messages.StageRetried)] == [2, 3, 4, 5, 6]
    assert kinds(events).count("Finished") == 1


def test_a_clip_is_decoded_only_once_an_encoder_has_room(tiny_nano: Path) -> None:
    stages = FakeStages()
    has_place = asyncio.Event()
    encode = stages._encode

    async def waits(context: Any, form: Any, media_id: str, clips: Any, stream_id: str) -> AsyncIterator[Any]:
        await has_place.wait()
        async for item in encode(context, form, media_id, clips, stream_id):
            yield item

    stages.encode = Method(waits)

    async def body() -> None:
        pipeline = asyncio.create_task(collect(stages.pipeline(tiny_nano)))
        while not stages.encode.responses:
            await asyncio.sleep(0.01)
        await settle()
        assert stages.decode.responses == []
        has_place.set()
        assert kinds(await pipeline).count("Finished") == 1

    run(body())


def test_leaving_while_a_clip_opens_leaves_none_open(tiny_nano: Path) -> None:
    stages = FakeStages()
    is_opening = asyncio.Event()

    async def slow_open(stream_id: str, window: int) -> None:
        await stages.clips.open(stream_id, window)
        is_opening.set()
        await asyncio.sleep(10)

    stages.open = Method(slow_open)

    async def body() -> None:
        pipeline = asyncio.create_task(collect(stages.pipeline(tiny_nano)))
        await is_opening.wait()
        pipeline.cancel()
        await asyncio.wait([pipeline])
        await until(stages.has_no_clip_open)

    run(body())


@pytest.mark.parametrize("call", ["open", "post", "complete"])
def test_a_clip_stream_that_does_not_answer_meets_the_deadline(call: str, tiny_nano: Path) -> None:
    stages = FakeStages()

    async def never(*arguments: Any) -> None:
        await asyncio.sleep(1000)

    setattr(stages, call, Method(never))
    with pytest.raises(DeadlineExceeded):
        run(collect(stages.pipeline(tiny_nano, limit_s=0.5)))


def test_an_item_that_never_arrives_meets_the_deadline(tiny_nano: Path) -> None:
    class Never:
        def __await__(self) -> Any:
            yield from asyncio.sleep(1000).__await__()

    class Stuck(Response):
        async def _to_object_ref_gen(self) -> AsyncIterator[Any]:
            async def refs() -> AsyncIterator[Any]:
                yield Never()

            return refs()

    async def body() -> None:
        context = RequestContext.new("r", 0.3)
        await RefStream(Stuck(None), context, "decode").next_value()

    with pytest.raises(DeadlineExceeded):
        run(body())


def test_a_deadline_travels_as_seconds_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    context = RequestContext.new("r", 10.0)
    data = pickle.dumps(context)
    before_s = time.monotonic()
    set_clocks(monkeypatch, monotonic_s=lambda: before_s + 5000.0)  # clocks of other machines differ
    there = pickle.loads(data)
    assert 9.0 < there.remaining_s("x") <= 10.0
    assert (there.request_id, there.try_id, there.limit_s) == ("r", context.try_id, 10.0)


def test_requests_with_equal_ids_do_not_mix(tiny_nano: Path) -> None:
    one, two = RequestContext.new("same", 1.0), RequestContext.new("same", 1.0)
    assert len({one.try_id, two.try_id, one.next_attempt().try_id}) == 3


def test_a_request_error_is_not_retried(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["denoise"] = [RequestError("seed", 1, "2")]
    with pytest.raises(RequestError):
        run(collect(stages.pipeline(tiny_nano)))
    assert len(stages.denoise.responses) == 1


@pytest.mark.parametrize("stage", ["tokenize", "denoise", "decode", "encode"])
def test_a_stage_that_never_answers_meets_the_deadline(stage: str, tiny_nano: Path) -> None:
    stages = FakeStages()

    async def never(*arguments: Any) -> None:
        await asyncio.sleep(1000)

    async def never_yields(*arguments: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(1000)
        yield None

    setattr(stages, stage, Method(never if stage == "tokenize" else never_yields))
    start_s = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        run(collect(stages.pipeline(tiny_nano, limit_s=0.5)))
    assert caught.value.limit_s == 0.5
    assert time.monotonic() - start_s < 10


def test_an_incomplete_file_is_not_handed_out(tiny_nano: Path) -> None:
    stages = FakeStages()

    async def cut_short(context: Any, form: Any, media_id: str, clips: Any, stream_id: str) -> AsyncIterator[Any]:
        stages.media.begun.append(media_id)
        yield messages.FileStarted(media_id, "video/mp4", 15)
        while await stages.clips.take(stream_id, 10):
            await stages.clips.release_chunk(stream_id)

    stages.encode = Method(cut_short)
    with pytest.raises(StageFailed, match="ended before the file"):
        run(collect(stages.pipeline(tiny_nano)))


def test_leaving_cancels_running_stages(tiny_nano: Path) -> None:
    stages = FakeStages(num_chunks=1000)

    async def leave() -> None:
        events = stages.pipeline(tiny_nano).events()
        async for event in events:
            if isinstance(event, messages.ChunkEncoded):
                break
        await events.aclose()  # type: ignore[attr-defined]
        await until(stages.has_no_clip_open)

    run(leave())
    assert stages.decode.responses[0].is_cancelled
    assert stages.encode.responses[0].is_cancelled
    assert stages.decoded < 20
    assert list(stages.media.failed) == stages.media.begun, "whoever watches the file is told"


def test_the_callers_picture_is_freed_once_encoded(tiny_nano: Path) -> None:
    class Media(np.ndarray[Any, Any]):
        """An array that can be weakly referenced."""

    stages = FakeStages()
    media = IMAGE.copy().view(Media)
    watched = weakref.ref(media)
    pipeline = stages.pipeline(tiny_nano, image=media)
    del media
    is_gone: list[bool] = []

    async def follow() -> None:
        async for event in pipeline.events():
            if isinstance(event, StepDone):
                gc.collect()
                is_gone.append(watched() is None)

    # The fakes keep their arguments.
    stages.encode_picture = Method(stages._encode_picture)
    set_handles(pipeline, vae=SimpleNamespace(decode=stages.decode, encode=ForgetfulMethod(stages)))
    run(follow())
    assert is_gone == [True]


class ForgetfulMethod:
    """:meth:`FakeStages._encode_picture` that keeps nothing of its arguments."""

    def __init__(self, stages: FakeStages) -> None:
        self._stages = stages

    def remote(self, context: RequestContext, picture: Any) -> Response:
        async def encode() -> AsyncIterator[Any]:
            yield messages.PictureEncoded(0.1, 1, 14)
            yield "clean latents"

        return Response(encode())


def test_every_gang_gets_the_given_frames(tiny_nano: Path) -> None:
    gangs = {"transformer": FakeStages(), "unguided": FakeStages()}
    gangs["transformer"].is_full = True
    pipeline = gangs["transformer"].pipeline(tiny_nano, image=IMAGE)
    set_handles(pipeline, unguided=gangs["unguided"])
    events = run(collect(pipeline))
    assert kinds(events).count("Finished") == 1
    assert gangs["unguided"].clean == ["clean latents of try 1"]


def test_the_streams_of_sound_requests_are_closed(tiny_nano: Path) -> None:
    stages = FakeSound()
    pipeline = stages.pipeline(tiny_nano, generate_sound=True)
    set_handles(pipeline, audio=stages.audio)

    async def body() -> None:
        await collect(pipeline)
        await until(stages.has_no_clip_open)

    run(body())
