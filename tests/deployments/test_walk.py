"""A request's walk with stages that are not there: order, retries, deadlines, ends. Without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cluster.clip_stream import ClipStreams
from cluster.errors import DeadlineExceeded, GangFailed, StageFailed
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest, resolve
from deployments import messages
from deployments.messages import RequestContext
from deployments.walk import Stages, Walk


class Response:
    """What a handle's call gives: awaited it is a value, iterated a stream of awaitables."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.was_cancelled = False

    def __await__(self) -> Any:
        return self._source.__await__()

    async def _to_object_ref_gen(self) -> AsyncIterator[Any]:
        async def refs() -> AsyncIterator[Any]:
            async for item in self._source:
                yield as_ref(item)

        return refs()

    def cancel(self) -> None:
        self.was_cancelled = True


class as_ref:
    """An object reference: awaited, it is the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


class Method:
    """``handle.method.remote(...)`` for a coroutine or an async generator function."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body
        self.responses: list[Response] = []

    def remote(self, *arguments: Any) -> Response:
        self.responses.append(Response(self._body(*arguments)))
        return self.responses[-1]


class FakeStages:
    """Four stages that do next to nothing; each can be told to fail so many times."""

    def __init__(self, num_chunks: int = 5) -> None:
        self.num_chunks = num_chunks
        self.failures: dict[str, list[BaseException]] = {}
        self.clips = ClipStreams(8)
        self.tokenize, self.denoise = Method(self._tokenize), Method(self._denoise)
        self.decode, self.encode = Method(self._decode), Method(self._encode)
        self.post, self.complete = Method(self.clips.post), Method(self.clips.complete)
        self.open = Method(self.clips.open)
        self.decoded = 0

    def fail(self, stage: str) -> None:
        if self.failures.get(stage):
            raise self.failures[stage].pop(0)

    async def _tokenize(self, context: RequestContext, request: Any) -> messages.TokenizedPair:
        self.fail("tokenize")
        return messages.TokenizedPair((1, 2), (3,), "given", 11)

    async def _denoise(self, context: RequestContext, job: Any) -> AsyncIterator[Any]:
        yield messages.StepsDone(1, 2, 0.5, 12)
        self.fail("denoise")
        yield messages.LatentsReady(0.1, 13, (12,))
        yield "latents"

    async def _decode(self, context: RequestContext, latents: Any, clips: Any, stream_id: str) -> AsyncIterator[Any]:
        assert latents.value == "latents"
        for index in range(self.num_chunks):
            assert await self.clips.acquire(stream_id, 10)
            if index == 2:
                self.fail("decode")
            self.decoded += 1
            yield messages.ChunkDecoded(index, time.time())
            yield f"chunk {index}"

    async def _encode(self, context: RequestContext, form: Any, clips: Any, stream_id: str) -> AsyncIterator[Any]:
        taken = 0
        while boxed := await self.clips.take(stream_id, 10):
            assert await boxed[0] == f"chunk {taken}"
            if taken == 1:
                self.fail("encode")
            yield messages.ChunkEncoded(taken, 1, 14, time.time(), 15)
            taken += 1
            await self.clips.release(stream_id)
        yield messages.ClipEncoded("hash", taken, 6, 0.1, 15)
        yield messages.MediaPart(b"abc")
        yield messages.MediaPart(b"def")

    def walk(self, tiny: Path, *, limit_s: float = 30, max_attempts: int = 3) -> Walk:
        layout = CheckpointLayout.open(tiny)
        request = GenerationRequest(prompt="a", num_frames=17, height=32, width=32, num_inference_steps=2)
        return Walk(
            request=resolve(request, layout),
            context=RequestContext("r", time.time() + limit_s, limit_s),
            layout=layout,
            stages=Stages(self, self, self, self),
            clips=self,
            chunk_window=2,
            max_attempts=max_attempts,
            close_later=lambda stream_id: asyncio.get_running_loop().create_task(self.clips.close(stream_id, "ended")),
        )


def run(body: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(body, 60))


async def collect(walk: Walk) -> list[Any]:
    return [event async for event in walk.events()]


def kinds(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_whole_walk(tiny_nano: Path) -> None:
    stages = FakeStages()
    events = run(collect(stages.walk(tiny_nano)))
    assert kinds(events)[:4] == ["Accepted", "Tokenized", "StepsDone", "LatentsReady"]
    assert kinds(events)[-4:] == ["ClipEncoded", "Finished", "MediaPart", "MediaPart"]
    assert b"".join(event.data for event in events if isinstance(event, messages.MediaPart)) == b"abcdef"
    for kind in ("ChunkDecoded", "ChunkEncoded"):
        assert [event.index for event in events if type(event).__name__ == kind] == list(range(5))
    finished = events[-3]
    assert set(finished.stage_seconds) == {"tokenize", "denoise", "decode_encode", "encode", "total"}
    assert all(method.responses[0].was_cancelled for method in (stages.denoise, stages.decode, stages.encode))


@pytest.mark.parametrize("stage", ["tokenize", "denoise", "decode", "encode"])
def test_a_death_is_retried_and_nothing_is_handed_out_twice(stage: str, tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures[stage] = [GangFailed("step", "died"), GangFailed("step", "died again")]
    events = run(collect(stages.walk(tiny_nano)))
    retried = [event for event in events if isinstance(event, messages.StageRetried)]
    assert [event.attempt for event in retried] == [2, 3]
    assert "died" in retried[0].reason
    assert kinds(events).count("Finished") == 1
    assert b"".join(event.data for event in events if isinstance(event, messages.MediaPart)) == b"abcdef"


@pytest.mark.parametrize("stage", ["tokenize", "denoise", "decode", "encode"])
def test_tries_are_counted(stage: str, tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures[stage] = [GangFailed("step", "died")] * 9
    with pytest.raises(StageFailed) as caught:
        run(collect(stages.walk(tiny_nano)))
    assert caught.value.attempts == 3
    assert len(stages.failures[stage]) == 6


def test_the_requests_own_fault_is_not_retried(tiny_nano: Path) -> None:
    stages = FakeStages()
    stages.failures["denoise"] = [RequestError("seed", 1, "2")]
    with pytest.raises(RequestError):
        run(collect(stages.walk(tiny_nano)))
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
        run(collect(stages.walk(tiny_nano, limit_s=0.5)))
    assert caught.value.limit_s == 0.5
    assert time.monotonic() - start_s < 10


def test_a_file_that_ends_early_is_not_handed_out(tiny_nano: Path) -> None:
    stages = FakeStages()

    async def cut_short(context: Any, form: Any, clips: Any, stream_id: str) -> AsyncIterator[Any]:
        while await stages.clips.take(stream_id, 10):
            await stages.clips.release(stream_id)
        yield messages.ClipEncoded("hash", 5, 6, 0.1, 15)
        yield messages.MediaPart(b"abc")

    stages.encode = Method(cut_short)
    with pytest.raises(StageFailed, match="ended before the file"):
        run(collect(stages.walk(tiny_nano)))


def test_leaving_in_the_middle_cancels_what_runs(tiny_nano: Path) -> None:
    stages = FakeStages(num_chunks=1000)

    async def leave() -> None:
        events = stages.walk(tiny_nano).events()
        async for event in events:
            if isinstance(event, messages.ChunkEncoded):
                break
        await events.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        assert await stages.clips.num_open() == 0

    run(leave())
    assert stages.decode.responses[0].was_cancelled
    assert stages.encode.responses[0].was_cancelled
    assert stages.decoded < 20
