"""Guardrails: adapters, the stage, its place in the pipeline. Any failure blocks. Without Ray."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ObjectLostError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.clip_stream import ClipStreams
from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded, GangFailed, OverloadedError, PreviewFailed, StageFailed
from cosmos3_core.errors import RequestError
from cosmos3_core.media.pixels import FrameHash, Frames
from cosmos3_core.media.writer import ClipFormat
from deployments import messages
from deployments.api.call import error_response
from deployments.config import DirectorStage, GuardrailsConfig
from deployments.director import guardrail_calls
from deployments.director.clip_pipeline import ClipPipeline, LatentsDecoder
from deployments.director.guardrail_calls import PromptCheck
from deployments.director.pipeline import Pipeline
from deployments.director.resources import PipelineResources
from deployments.errors import AdapterError, ContentBlocked, GuardrailUnavailable
from deployments.failures import explain_error
from deployments.messages import FrameChunk, FramesChecked, RequestContext, TextChecked
from deployments.stages import guardrail
from deployments.stages.guardrail import Guardrails
from deployments.stages.guardrail_adapter import CosmosGuardrail, load_guardrail
from deployments.stages.handles import StageHandles
from tests.director.test_pipeline import FakeMedia, FakeStages, set_handles
from tests.serve_fakes import Method, Ref
from tests.settling import run

PROMPT = "a prompt that must not be told on"


class HalvingAdapter:
    """Blocks a word and black pictures; halves all other frames. Fails on demand."""

    def __init__(self, word: str = "forbidden") -> None:
        self.word = word
        self.failures: list[Exception] = []
        self.prompts: list[str] = []
        self.num_frames = 0

    def check_text(self, prompt: str) -> None:
        self.prompts.append(prompt)
        self.fail()
        if self.word in prompt:
            raise ContentBlocked("prompt")

    def check_frames(self, frames: Frames) -> Frames:
        self.num_frames += len(frames)
        self.fail()
        if not frames.any():
            raise ContentBlocked("pictures")
        return frames // 2

    def fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


class WithoutFrames:
    """An adapter without a method for frames."""

    def check_text(self, prompt: str) -> None: ...


def test_an_adapter_is_loaded_by_module_and_class_with_its_options() -> None:
    made = load_guardrail(f"{__name__}:HalvingAdapter", {"word": "other"})
    with pytest.raises(ContentBlocked):
        made.check_text("the other one")


@pytest.mark.parametrize(
    ("adapter", "options", "problem"),
    [
        ("cosmos-gardrail", {}, "no such adapter"),
        ("no.such.module:Class", {}, "cannot be imported"),
        (f"{__name__}:NoSuchClass", {}, "cannot be imported"),
        (":Class", {}, "cannot be imported"),
        (f"{__name__}:HalvingAdapter", {"wrod": "a"}, "(word: 'str' = 'forbidden')"),
        (f"{__name__}:WithoutFrames", {}, "lacks check_text or check_frames"),
        ("cosmos-guardrail", {"gpu": True}, "(device: 'str' = 'cpu'"),
    ],
)
def test_an_unusable_adapter_is_refused_at_the_start(adapter: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_guardrail(adapter, options)
    assert str(caught.value).startswith(f"guardrails.adapter={adapter}: ")
    assert problem in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def cosmos_guardrail(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interface of NVIDIA's package 0.3, with scripted answers of its models."""
    package: Any = ModuleType("cosmos_guardrail")
    package.listed, package.label, package.devices, package.faces = [], "Safe", [], []

    class Blocklist:
        def is_safe(self, prompt: str) -> tuple[bool, str]:
            is_safe = not any(word in prompt for word in package.listed)
            return is_safe, "" if is_safe else f"Prompt blocked: {prompt}"

    class Qwen3Guard:
        def extract_label_and_categories(self, prompt: str) -> tuple[bool, str]:
            return package.label.lower() != "unsafe", f"blocked {prompt}"

        def is_safe(self, prompt: str) -> tuple[bool, str]:
            try:
                return self.extract_label_and_categories(prompt)
            except Exception:  # noqa: BLE001 - as it is there
                return True, "Unexpected error occurred when running Qwen3Guard guardrail."

    class RetinaFaceFilter:
        pass

    class CosmosSafetyChecker:
        def __init__(self) -> None:
            self.models: list[Any] = [Blocklist(), Qwen3Guard(), RetinaFaceFilter()]

        def to(self, device: Any = None, dtype: Any = None) -> None:
            package.devices.append(device)

        def check_text_safety(self, prompt: str) -> bool:
            return all(model.is_safe(prompt)[0] for model in self.models[:2])

        def check_video_safety(self, frames: Frames) -> Frames | None:
            frames[:, 0] = 0  # in place, as NVIDIA's does
            return None if package.faces is None else np.array(list(frames))

    package.CosmosSafetyChecker, package.Qwen3Guard = CosmosSafetyChecker, Qwen3Guard
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", package)
    return package


def test_nvidias_guardrail_checks_text_and_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    package = cosmos_guardrail(monkeypatch)
    made = load_guardrail("cosmos-guardrail", {"device": "cuda"})
    assert package.devices == ["cuda"]
    made.check_text(PROMPT)
    frames = np.full((2, 4, 4, 3), 9, np.uint8)
    frames.flags.writeable = False
    checked = made.check_frames(frames)
    assert not checked[:, 0].any()
    assert (frames == 9).all()
    package.listed = ["prompt"]
    with pytest.raises(ContentBlocked) as caught:
        made.check_text(PROMPT)
    assert PROMPT not in str(caught.value)
    package.listed, package.label = [], "Unsafe"
    with pytest.raises(ContentBlocked):
        made.check_text(PROMPT)
    package.faces = None
    with pytest.raises(ContentBlocked, match="pictures"):
        made.check_frames(frames)


def test_nvidias_guardrail_blocks_if_its_language_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    package = cosmos_guardrail(monkeypatch)
    made = CosmosGuardrail()
    package.label = None  # an answer without a label
    assert package.CosmosSafetyChecker().check_text_safety(PROMPT), "asked as a whole it passes"
    with pytest.raises(AttributeError):
        made.check_text(PROMPT)


def test_nvidias_guardrail_is_refused_if_missing_or_of_another_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    with pytest.raises(AdapterError, match="pip install cosmos-guardrail"):
        CosmosGuardrail()
    package = cosmos_guardrail(monkeypatch)
    package.Qwen3Guard.__name__ = "Aegis"
    with pytest.raises(AdapterError, match="Aegis.*version 0.3"):
        CosmosGuardrail()


def stage(adapter: Any, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Guardrails:
    monkeypatch.setattr(guardrail, "load_guardrail", lambda name, options: adapter)
    return Guardrails(GuardrailsConfig(adapter="given", **config))


def context(limit_s: float = 30.0) -> RequestContext:
    return RequestContext.new("r", limit_s)


def chunk_of(*strips: Frames, index: int = 0, axis: int = 1) -> FrameChunk:
    return FrameChunk(index, tuple(map(TensorEnvelope.of_array, strips)), axis, 7)


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


LEFT, RIGHT = np.full((2, 4, 3, 3), 100, np.uint8), np.full((2, 4, 5, 3), 50, np.uint8)


def test_a_passed_chunk_is_one_strip_and_otherwise_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HalvingAdapter()
    checked, word = run(all_of(stage(adapter, monkeypatch).check_frames(context(), chunk_of(LEFT, RIGHT, axis=2))))
    assert np.array_equal(checked.frames(), np.concatenate([LEFT, RIGHT], 2) // 2)
    assert (checked.index, checked.pid, len(checked.strips)) == (0, 7, 1)
    assert isinstance(word, FramesChecked)
    (said,) = run(all_of(stage(adapter, monkeypatch).check_text(context(), PROMPT)))
    assert isinstance(said, TextChecked)
    assert adapter.prompts == [PROMPT]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda frames: None, "pictures"),
        (lambda frames: list(frames), "pictures"),
        (lambda frames: frames[:1], "pictures"),
        (lambda frames: frames.astype(np.float32), "pictures"),
        (lambda frames: frames.fill(0) or frames, "pictures"),
        (lambda frames: 1 / 0, "pictures"),
    ],
)
@pytest.mark.parametrize("strips", [(LEFT,), (LEFT, RIGHT)])
def test_frames_are_blocked_if_the_adapter_fails(
    answer: Callable[[Frames], Any], match: str, strips: tuple[Frames, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = HalvingAdapter()
    monkeypatch.setattr(adapter, "check_frames", answer)
    with pytest.raises(GuardrailUnavailable, match=match):
        run(all_of(stage(adapter, monkeypatch).check_frames(context(), chunk_of(*strips, axis=2))))


def test_a_prompt_is_blocked_and_not_shown_if_the_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HalvingAdapter()
    adapter.failures = [ZeroDivisionError(PROMPT)]
    with pytest.raises(GuardrailUnavailable) as caught:
        run(all_of(stage(adapter, monkeypatch).check_text(context(), PROMPT)))
    assert PROMPT not in str(caught.value)


def test_an_adapters_reason_for_a_block_stays_in_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HalvingAdapter()
    adapter.failures = [ContentBlocked(PROMPT)]
    with pytest.raises(ContentBlocked) as caught:
        run(all_of(stage(adapter, monkeypatch).check_text(context(), PROMPT)))
    assert PROMPT not in str(caught.value)


class Slow(HalvingAdapter):
    """A slow adapter that counts concurrent checks."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.num_now = self.num_most = 0

    def check_text(self, prompt: str) -> None:
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        self.go_on.wait(20)
        self.num_now -= 1


def test_a_hanging_adapter_blocks_and_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve then starts another replica."""
    adapter, ended = Slow(), []
    monkeypatch.setattr(guardrail.os, "_exit", ended.append)
    monkeypatch.setattr("deployments.threads._GRACE_S", 0.01)

    async def body() -> None:
        with pytest.raises(GuardrailUnavailable, match="prompt"):
            await all_of(stage(adapter, monkeypatch, text_timeout_s=0.1).check_text(context(), PROMPT))
        while not ended:
            await asyncio.sleep(0.01)
        adapter.go_on.set()

    run(body())
    assert ended == [1]


def test_checks_run_one_at_a_time_even_if_a_caller_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Slow()

    async def body() -> None:
        guardrails = stage(adapter, monkeypatch)
        first = asyncio.create_task(all_of(guardrails.check_text(context(), "first")))
        while not adapter.num_now:
            await asyncio.sleep(0.01)
        first.cancel()
        second = asyncio.create_task(all_of(guardrails.check_text(context(), "second")))
        with pytest.raises(DeadlineExceeded):
            await all_of(guardrails.check_text(context(0.05), "third"))
        assert adapter.num_now == 1
        adapter.go_on.set()
        assert len(await second) == 1

    run(body())
    assert adapter.num_most == 1


class Handle:
    """The stage's streaming handle; each call can fail before it reaches the stage."""

    def __init__(self, guardrails: Any) -> None:
        self._guardrails = guardrails
        self.failures: list[Exception] = []
        self.check_text, self.check_frames = Method(self._text), Method(self._frames)

    async def _text(self, context: RequestContext, prompt: str) -> AsyncIterator[Any]:
        self._fail()
        async for item in self._guardrails.check_text(context, prompt):
            yield item

    async def _frames(self, context: RequestContext, chunk_ref: Any) -> AsyncIterator[Any]:
        self._fail()
        async for item in self._guardrails.check_frames(context, await chunk_ref):
            yield item

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


async def check_prompt(handle: Any, text_timeout_s: float, context: RequestContext, prompt: str) -> None:
    await PromptCheck(handle, text_timeout_s, may_be_skipped=False).check_at_admission(
        context, prompt, is_skipped=False
    )


def make_death() -> Exception:
    return ActorDiedError()


def test_a_prompt_is_checked_before_its_request_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(stage(HalvingAdapter(), monkeypatch))
    run(check_prompt(handle, 1.0, context(), PROMPT))
    with pytest.raises(ContentBlocked, match="prompt"):
        run(check_prompt(handle, 1.0, context(), "something forbidden"))
    assert all(response.is_cancelled for response in handle.check_text.responses)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([make_death()], None),
        ([make_death(), make_death()], GuardrailUnavailable),
        ([DeploymentUnavailableError(SimpleNamespace(name="Guardrails", app_name="a"))], GuardrailUnavailable),
        ([BackPressureError(1, 2)], OverloadedError),
        ([GuardrailUnavailable("prompt")], GuardrailUnavailable),
    ],
    ids=["one death", "two deaths", "none is up", "full", "the adapter"],
)
def test_a_prompt_passes_only_if_the_guardrail_says_so(
    failures: list[Exception], expected: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.director.retries._RETRY_PAUSE_S", 0.01)
    adapter = HalvingAdapter()
    handle = Handle(stage(adapter, monkeypatch))
    handle.failures = list(failures)
    if expected is None:
        run(check_prompt(handle, 1.0, context(), PROMPT))
    else:
        with pytest.raises(expected):
            run(check_prompt(handle, 1.0, context(), PROMPT))
    assert adapter.prompts == [PROMPT] * (expected is None)


def test_a_guardrail_without_an_answer_blocks_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(context: RequestContext, prompt: str) -> AsyncIterator[Any]:
        await asyncio.sleep(1000)
        yield TextChecked(1)

    async def nothing(context: RequestContext, prompt: str) -> AsyncIterator[Any]:
        return
        yield TextChecked(1)

    monkeypatch.setattr(guardrail_calls, "_WAIT_S", 0.1)
    for answer in (never, nothing):
        with pytest.raises(GuardrailUnavailable):
            run(check_prompt(SimpleNamespace(check_text=Method(answer)), 0.1, context(), PROMPT))
    with pytest.raises(DeadlineExceeded):
        run(check_prompt(SimpleNamespace(check_text=Method(never)), 30.0, context(0.1), PROMPT))


@pytest.mark.parametrize("may_be_skipped", [False, True])
def test_skipping_guardrails_needs_the_operators_permission(
    may_be_skipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = HalvingAdapter()
    check = PromptCheck(Handle(stage(adapter, monkeypatch)), 1.0, may_be_skipped)
    with pytest.raises(ContentBlocked):
        run(check.check_at_admission(context(), "forbidden", is_skipped=False))
    if may_be_skipped:
        run(check.check_at_admission(context(), "forbidden", is_skipped=True))
    else:
        with pytest.raises(RequestError, match="skip_guardrails"):
            run(check.check_at_admission(context(), "forbidden", is_skipped=True))
    assert adapter.prompts == ["forbidden"]


def test_a_passed_prompt_is_not_checked_again_when_its_job_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guardrail_calls, "_MAX_PASSED", 2)
    adapter = HalvingAdapter()
    check = PromptCheck(Handle(stage(adapter, monkeypatch)), 1.0, True)

    async def body() -> None:
        await check.check_at_admission(context(), "a", is_skipped=False)
        await check.check_at_admission(context(), "b", is_skipped=True)
        for prompt in ("a", "b", "c", "b", "a"):
            assert await all_of(check.check_job(context(), 3, prompt)) == []
        for _ in range(2):
            with pytest.raises(ContentBlocked):
                await all_of(check.check_job(context(), 3, "forbidden"))

    run(body())
    assert adapter.prompts == ["a", "b", "c", "a", "forbidden", "forbidden"], "the oldest is forgotten"


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([make_death(), make_death()], None),
        ([make_death(), make_death(), make_death()], StageFailed),
        ([BackPressureError(1, 2)], None),
        ([GuardrailUnavailable("prompt")], GuardrailUnavailable),
    ],
    ids=["two deaths", "three deaths", "full", "the adapter"],
)
def test_a_job_starts_only_if_the_guardrail_passes_its_prompt(
    failures: list[Exception], expected: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.director.retries._RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr("deployments.director.retries._LONGEST_WAIT_S", 0.01)
    adapter = HalvingAdapter()
    handle = Handle(stage(adapter, monkeypatch))
    handle.failures = list(failures)
    check = PromptCheck(handle, 1.0, False)
    if expected is None:
        events = run(all_of(check.check_job(context(), 3, PROMPT)))
        kinds = [messages.StageRetried if type(it) is ActorDiedError else messages.StageFull for it in failures]
        assert [(type(event), event.stage) for event in events] == [(kind, "guardrail") for kind in kinds]
    else:
        with pytest.raises(expected):
            run(all_of(check.check_job(context(), 3, PROMPT)))
    assert adapter.prompts == [PROMPT] * (expected is None)


@dataclass
class StartedJob:
    """The parts of a Director that start a job; the job was accepted before a guardrail was configured."""

    tiny: Path
    handle: Handle | None
    clients_may_disable: bool
    stages: FakeStages = field(default_factory=FakeStages)

    def pipeline(self, prompt: str = "a", *, skips: bool = False) -> Any:
        """Make the pipeline as the runner gets it."""
        made = self.stages.pipeline(self.tiny, prompt=prompt)
        set_handles(made, guardrail=self.handle)
        prompt_check = PromptCheck(self.handle, 10.0, self.clients_may_disable) if self.handle else None
        resources = replace(made.resources, prompt_check=prompt_check)
        job: Any = SimpleNamespace(skip_guardrails=skips, previews=0)
        return Pipeline.of_job(resources, made.request, made.context, job, None, lambda step, state: None)


@pytest.mark.parametrize(
    ("skips", "may_skip", "is_looked_at"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_a_job_skips_guardrails_only_while_the_operator_permits_it(
    skips: bool, may_skip: bool, is_looked_at: bool, tiny_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may have been accepted under another configuration."""
    adapter = HalvingAdapter()
    started = StartedJob(tiny_nano, Handle(stage(adapter, monkeypatch)), may_skip)

    async def body() -> None:
        pipeline = started.pipeline("forbidden", skips=skips)
        if is_looked_at:
            with pytest.raises(ContentBlocked, match="prompt"):
                await all_of(pipeline.events())
            assert pipeline.resources.stages.guardrail is started.handle, "its pictures would be looked at"
        else:
            assert pipeline.resources.stages.guardrail is None
            assert isinstance((await all_of(pipeline.events()))[-1], messages.Finished)

    run(body())
    assert adapter.prompts == ["forbidden"] * is_looked_at
    assert len(started.stages.tokenized) == (not is_looked_at), "nothing is begun"


def test_a_job_whose_prompt_passes_runs(tiny_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HalvingAdapter()
    started = StartedJob(tiny_nano, Handle(stage(adapter, monkeypatch)), False)

    async def body() -> None:
        async for event in started.pipeline().events():
            assert isinstance(event, messages.Tokenized)
            break

    run(body())
    assert adapter.prompts == ["a"]


def test_without_a_guardrail_a_job_starts_at_once(tiny_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = StartedJob(tiny_nano, None, False)

    async def body() -> None:
        events = await all_of(started.pipeline(skips=True).events())
        assert isinstance(events[-1], messages.Finished)

    run(body())


@dataclass
class Clip:
    """A decoder of real frames, the guardrail, and an encoder that hashes what it gets."""

    guardrail: Handle | None
    shades: tuple[int, ...] = (10, 20, 30, 40, 50)
    with_sound: bool = False
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    media: FakeMedia = field(default_factory=FakeMedia)
    clips: ClipStreams = field(default_factory=lambda: ClipStreams(4))
    taken: list[Any] = field(default_factory=list)
    num_decoded: int = 0

    def frames(self, shade: int) -> Frames:
        return np.full((2, 4, 4, 3), shade, np.uint8)

    async def decode(
        self, context: RequestContext, latents: Any, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[Any]:
        for index, shade in enumerate(self.shades):
            assert await self.clips.acquire(stream_id, producer, 10)
            if index == 2 and self.failures.get("decode"):
                raise self.failures["decode"].pop(0)
            self.num_decoded += 1
            yield chunk_of(self.frames(shade), index=index)
            yield messages.ChunkDecoded(index, time.time(), 1)

    async def decode_sound(
        self, context: RequestContext, latents: Any, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[Any]:
        assert await self.clips.acquire(stream_id, producer, 10)
        yield messages.SoundChunk(0, TensorEnvelope.of_array(np.zeros((2, 8), np.float32)), 3)
        yield messages.SoundDecoded(0, time.time(), 3)

    async def encode(
        self, context: RequestContext, form: Any, media_id: str, clips: Any, stream_id: str
    ) -> AsyncIterator[Any]:
        self.media.begun.append(media_id)
        digest, num_frames = FrameHash(), 0
        yield messages.FileStarted(media_id, "video/mp4", 2)
        while boxed := await self.clips.take(stream_id, 10):
            chunk = await boxed[0]
            self.taken.append(chunk)
            if isinstance(chunk, FrameChunk):
                digest.update(chunk.frames())
                num_frames += len(chunk.frames())
            await self.clips.release_chunk(stream_id)
        yield messages.ClipEncoded(media_id, digest.hexdigest(), num_frames, 6, 0.1, 2)

    def pipeline(self, max_attempts: int = 3) -> ClipPipeline:
        names = ("open", "complete", "forget_producer", "return_credit", "post")
        decoders = [LatentsDecoder("video", SimpleNamespace(decode=Method(self.decode)), Ref("latents"))]
        if self.with_sound:
            sound = SimpleNamespace(decode=Method(self.decode_sound))
            decoders.append(LatentsDecoder("sound", sound, Ref("latents")))
        encoder = SimpleNamespace(encode=Method(self.encode))
        resources = PipelineResources(
            layout=None,  # type: ignore[arg-type]
            stages=StageHandles(None, None, None, encoder, guardrail=self.guardrail),
            clips=SimpleNamespace(**{name: Method(getattr(self.clips, name)) for name in names}),
            media=self.media,  # type: ignore[arg-type]
            config=DirectorStage(chunk_window=2, max_attempts=max_attempts),
            close_later=lambda _, stream_id: asyncio.get_running_loop().create_task(
                self.clips.close(stream_id, "ended")
            ),
            previews=None,  # type: ignore[arg-type]
        )
        return ClipPipeline(resources, context(), ClipFormat("mp4", height=4, width=4, fps=24), tuple(decoders))

    def events(self, **options: Any) -> list[Any]:
        async def body() -> list[Any]:
            return [event async for event in self.pipeline(**options).events()]

        events = run(body())
        assert isinstance(events, list)
        return events

    def list_shades(self) -> list[int]:
        return [int(chunk.frames()[0, 0, 0, 0]) for chunk in self.taken if isinstance(chunk, FrameChunk)]


def of_kind(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_frames_reach_the_encoder_as_the_guardrail_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(Handle(stage(HalvingAdapter(), monkeypatch)))
    events = clip.events()
    assert clip.list_shades() == [5, 10, 15, 20, 25]
    assert [chunk.index for chunk in clip.taken] == list(range(5))
    assert {chunk.pid for chunk in clip.taken} == {7}
    assert [event.index for event in of_kind(messages.ChunkDecoded, events)] == list(range(5))
    unguarded = Clip(None).events()
    assert unguarded[-1].num_frames == events[-1].num_frames == 10
    assert unguarded[-1].frames_sha256 != events[-1].frames_sha256


def test_sound_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HalvingAdapter()
    clip = Clip(Handle(stage(adapter, monkeypatch)), with_sound=True)
    events = clip.events()
    assert len(of_kind(messages.SoundChunk, clip.taken)) == len(of_kind(messages.SoundDecoded, events)) == 1
    assert adapter.num_frames == 10


@pytest.mark.parametrize(
    ("shades", "failures", "expected"),
    [
        ((10, 0, 30), [], ContentBlocked),
        ((10, 20, 30), [ZeroDivisionError(PROMPT)], GuardrailUnavailable),
        ((10, 20, 30), [MemoryError()], GuardrailUnavailable),
    ],
)
def test_blocked_frames_end_the_request_and_its_file(
    shades: tuple[int, ...], failures: list[Exception], expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = HalvingAdapter()
    adapter.failures = list(failures)
    clip = Clip(Handle(stage(adapter, monkeypatch)), shades)
    with pytest.raises(expected, match="pictures"):
        clip.events()
    assert list(clip.media.failed) == clip.media.begun
    assert expected.__name__ in clip.media.failed[clip.media.begun[0]]
    assert clip.list_shades() in ([], [5]), "nothing from there on"
    assert len(clip.media.begun) == 1, "it is not tried again"


def test_a_dead_guardrail_is_retried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(stage(HalvingAdapter(), monkeypatch))
    handle.failures = [make_death(), make_death()]
    clip = Clip(handle)
    events = clip.events()
    assert [(event.stage, event.attempt) for event in of_kind(messages.StageRetried, events)] == [
        ("guardrail", 2),
        ("guardrail", 3),
    ]
    assert clip.list_shades() == [5, 10, 15, 20, 25]
    assert clip.num_decoded == 5
    assert all(response.is_cancelled for response in handle.check_frames.responses)


def test_a_guardrail_that_keeps_dying_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(stage(HalvingAdapter(), monkeypatch))
    handle.failures = [make_death() for _ in range(20)]
    clip = Clip(handle)
    with pytest.raises(StageFailed, match="'guardrail' failed 2 times"):
        clip.events(max_attempts=2)
    assert len(handle.check_frames.responses) == 2
    assert clip.taken == []
    assert list(clip.media.failed) == clip.media.begun


def test_a_full_guardrail_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(stage(HalvingAdapter(), monkeypatch))
    handle.failures = [BackPressureError(1, 2)]
    clip = Clip(handle, (10, 20))
    monkeypatch.setattr("deployments.director.retries._LONGEST_WAIT_S", 0.01)
    assert of_kind(messages.StageRetried, clip.events()) == []
    assert clip.list_shades() == [5, 10]


def test_a_guardrail_that_ends_without_a_result_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wordless(context: RequestContext, chunk_ref: Any) -> AsyncIterator[Any]:
        yield await chunk_ref

    clip = Clip(SimpleNamespace(check_frames=Method(wordless)))  # type: ignore[arg-type]
    with pytest.raises(StageFailed, match="without checked frames"):
        clip.events()
    assert clip.taken == []


def test_a_chunk_lost_before_the_guardrail_is_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(stage(HalvingAdapter(), monkeypatch))
    clip = Clip(handle)
    calls = handle.check_frames

    def lose_the_third(context: RequestContext, chunk_ref: Any) -> Any:
        if len(calls.responses) == 2 and not clip.failures:
            clip.failures["lost"] = []
            return calls.remote(context, Ref(None, ObjectLostError("00", None, "")))
        return calls.remote(context, chunk_ref)

    clip.guardrail = SimpleNamespace(check_frames=SimpleNamespace(remote=lose_the_third))  # type: ignore[assignment]
    events = clip.events()
    assert [event.stage for event in of_kind(messages.StageRetried, events)] == ["decode"]
    assert [event.index for event in of_kind(messages.ChunkDecoded, events)] == list(range(5))
    assert clip.list_shades() == [5, 10, 15, 20, 25]


def test_checked_chunks_are_not_checked_again_after_a_decoders_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = HalvingAdapter()
    clip = Clip(Handle(stage(adapter, monkeypatch)))
    clip.failures["decode"] = [GangFailed("decode", "died")]
    events = clip.events()
    assert [event.stage for event in of_kind(messages.StageRetried, events)] == ["decode"]
    assert clip.list_shades() == [5, 10, 15, 20, 25]
    assert (clip.num_decoded, adapter.num_frames) == (7, 10)


def test_previews_are_off_with_guardrails(tiny_nano: Path) -> None:
    """A preview reaches clients long before the guardrail sees the frames."""

    pipeline = FakeStages().pipeline(tiny_nano)
    set_handles(pipeline, guardrail=object())
    with pytest.raises(PreviewFailed, match="guardrail"):
        run(pipeline._order_previews())
    assert pipeline.resources.without_guardrail().stages.guardrail is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContentBlocked("prompt"), 400, "content_blocked"),
        (ContentBlocked("pictures"), 400, "content_blocked"),
        (GuardrailUnavailable("prompt"), 503, "guardrail_unavailable"),
    ],
)
def test_guardrail_errors_have_their_http_status(error: Exception, status: int, code: str) -> None:
    answer = error_response(pickle.loads(pickle.dumps(error)))
    body = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, body["code"], body["message"]) == (status, code, str(error))
    assert body["type"] == ("invalid_request_error" if status == 400 else "server_error")
    assert ("retry-after" in answer.headers) == (status == 503)
    assert not explain_error(error).needs_log
