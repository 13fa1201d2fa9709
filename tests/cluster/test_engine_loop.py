"""The leader's loop on a fake gang: order, positions, cancelling, bounds, saving, failure. Without Ray."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cluster import engine_loop, leader_loop
from cluster.engine_loop import Denoised, EngineLoop, LoopSpec, SavedState
from cluster.envelope import TensorEnvelope
from cluster.errors import (
    DeadlineExceeded,
    GangFailed,
    GangLost,
    OutOfMemory,
    OverloadedError,
    PreviewFailed,
    StepAbandoned,
)
from cluster.events import PreviewReady, PreviewsOff, QueuePosition, StepDone
from cluster.layer_gate import Position
from cluster.logs import LogOrigin
from cluster.transformer_rank import StepReport
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import MediaError, RequestError, StateError
from cosmos3_core.preview import PreviewMap, PreviewOrder
from cosmos3_core.prompt_ledger import PromptOrders, RequestMemory, text_key
from cosmos3_core.shapes import LatentShape
from tests.observability.recording import CallRecorder
from tests.settling import run, settle, until

VIDEO, IMAGE = LatentShape(2, 1, 1), LatentShape(1, 1, 1)


def request(num_steps: int, seed: int = 0, shape: LatentShape = VIDEO) -> DenoiseRequest:
    return DenoiseRequest((1,), (1,), shape, 24.0, num_steps, 1.0, "native", 3.0, seed)


@dataclass
class FakeGang:
    """Answers like a gang of one and records its calls. A saved state is the number of steps done."""

    step_s: float = 0.001
    fail_at_step: int | None = None
    raise_at_step: int | None = None
    no_memory_at_step: int | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    timeouts_s: list[tuple[str, float]] = field(default_factory=list)
    save_s: float = 0.0
    ends: list[bool] = field(default_factory=list)
    no_previews_from_step: int | None = None
    gate: asyncio.Semaphore | None = None  # one place a quantum
    reported_step_s: float | None = None  # reported seconds per step, if not the real ones
    max_begun: int = 0
    long_steps_of: str | None = None  # a request whose steps end only by being left
    step_was_left: asyncio.Event = field(default_factory=asyncio.Event)
    gate_error: Exception | None = None
    # 100 bytes for each latent frame.
    request_memory: RequestMemory = RequestMemory(100, 0, 0, 0, 0, 1)  # noqa: RUF009 - frozen

    async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        assert method in ("begin", "step")
        return await self.call(method, *arguments, phase=phase, timeout_s=timeout_s)

    async def call_rank_0(
        self, method: str, *arguments: Any, phase: str, timeout_s: float, reraises: type[Exception] | None = None
    ) -> Any:
        assert reraises is (PreviewFailed if method == "preview" else None)
        return (await self.call(method, *arguments, phase=phase, timeout_s=timeout_s))[0]

    async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        assert timeout_s > 0
        self.calls.append((method, arguments))
        self.timeouts_s.append((method, timeout_s))
        await asyncio.sleep(0)
        job_id = arguments[0] if arguments else None
        if method == "begin":
            _, job, _, state, _, _ = arguments
            if job.seed == 667:
                raise ZeroDivisionError("a bug")
            if job.seed == 666:
                raise RequestError("seed", 666, "another one")
            if job.seed == 668:
                raise OutOfMemory("of 1 GiB")
            assert job_id not in self.progress
            self.progress[job_id] = (0 if state is None else int(state.array()[0]), job.num_inference_steps)
            self.max_begun = max(self.max_begun, len(self.progress))
        elif method == "step":
            done, total = self.progress[job_id]
            if self.fail_at_step is not None and done >= self.fail_at_step:
                raise GangFailed("step", "a rank died")
            if self.raise_at_step is not None and done >= self.raise_at_step:
                raise StateError("one rank's own trouble")
            if self.no_memory_at_step is not None and done >= self.no_memory_at_step and job_id == "large":
                del self.progress[job_id]
                raise OutOfMemory("of 1 GiB")
            if job_id == self.long_steps_of:
                await self.step_was_left.wait()
                raise StepAbandoned(7)
            if self.gate is not None:
                await self.gate.acquire()
            count = min(arguments[1], total - done)
            await asyncio.sleep(self.step_s * count)
            self.progress[job_id] = (done + count, total)
            steps = tuple(StepDone(done + index + 1, total, 0.5, 0.1, os.getpid()) for index in range(count))
            return [StepReport(steps, (self.reported_step_s or self.step_s) * count)]
        elif method == "preview":
            done, _ = self.progress[job_id]
            if self.no_previews_from_step is not None and done >= self.no_previews_from_step:
                raise PreviewFailed("another VAE's map")
            return [TensorEnvelope.of_array(np.full((arguments[2] // 2, 3, 4, 3), 20 * done % 256, np.uint8))]
        elif method in ("latents", "read_state"):
            await asyncio.sleep(self.save_s if method == "read_state" else 0)
            envelope = TensorEnvelope.of_array(np.array([self.progress[job_id][0]], np.int64))
            return [envelope if method == "read_state" else {"video": envelope}]
        elif method == "end":
            self.progress.pop(job_id, None)
        return [None]

    async def call_gates(self, method: str, *arguments: Any) -> list[Any]:
        if self.gate_error is not None:
            raise self.gate_error
        if method == "read_position":
            return [Position(1, 5, 100)]
        if method == "decide":
            assert arguments == (True,)
            self.step_was_left.set()
        return [True]

    def calls_of(self, method: str) -> list[Any]:
        """List the arguments of a method's calls."""
        return [arguments for name, arguments in self.calls if name == method]

    def list_turns(self) -> list[str]:
        """List whose steps ran, in order, without consecutive repeats."""
        jobs = [arguments[0] for arguments in self.calls_of("step")]
        return [job for index, job in enumerate(jobs) if index == 0 or jobs[index - 1] != job]


def loop_on(gang: FakeGang, meter: Any = None, **changes: Any) -> EngineLoop:
    spec = {
        "max_jobs": 4,
        "max_held_bytes": 10_000,
        "text_cache_bytes": 0,
        "save_period_s": 60.0,
        "first_step_timeout_s": 10.0,
        "quantum_timeout_s": 10.0,
    }
    how = LoopSpec(**{**spec, **changes})  # type: ignore[arg-type]
    return EngineLoop(gang, gang.request_memory, how, lambda: gang.ends.append(True), meter)  # type: ignore[arg-type]


async def follow(loop: EngineLoop, job_id: str, num_steps: int, **fields: Any) -> list[Any]:
    state = fields.pop("state", None)
    return [update async for update in loop.submit(job_id, request(num_steps, **fields), 60.0, state)]


def steps_of(updates: list[Any]) -> list[int]:
    return [update.step for update in updates if isinstance(update, StepDone)]


def test_a_request_gets_its_position_every_step_and_its_latents() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = loop_on(gang)
        updates = await follow(loop, "a", 1000)
        assert updates[0] == QueuePosition(0, os.getpid())
        assert steps_of(updates) == list(range(1, 1001))
        # Quanta of about a quarter second: neither single steps nor all at once.
        assert 3 <= len(gang.calls_of("step")) <= 20
        assert isinstance(updates[-1], Denoised)
        await settle()
        assert gang.progress == {}
        assert loop.num_jobs == 0

    run(body())


def test_requests_run_in_order_and_positions_count_down() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = loop_on(gang, max_jobs=3)
        results = await asyncio.gather(*(follow(loop, name, 300) for name in "abc"))
        positions = [
            [update.position for update in updates if isinstance(update, QueuePosition)] for updates in results
        ]
        assert positions == [[0], [1, 0], [2, 1, 0]]
        begun = [arguments[0] for method, arguments in gang.calls if method == "begin"]
        assert begun == ["a", "b", "c"]

    run(body())


def test_a_cancelled_request_leaves_at_the_next_quantum_and_the_next_one_runs() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang, max_jobs=3)

        async def leave_early() -> None:
            async for update in loop.submit("a", request(1000), 60.0):
                if isinstance(update, StepDone):
                    return

        waiting = asyncio.create_task(follow(loop, "waiting", 10))
        first = asyncio.create_task(leave_early())
        await first
        assert isinstance((await waiting)[-1], Denoised)
        done, total = gang.progress.get("a", (0, 1000))
        assert done < total
        assert isinstance((await follow(loop, "b", 5))[-1], Denoised)
        assert "a" not in gang.progress

    run(body())


def test_a_request_cancelled_while_queued_never_starts() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = loop_on(gang, max_jobs=3)
        running = asyncio.create_task(follow(loop, "a", 500))
        waiting = asyncio.create_task(follow(loop, "b", 500))
        await settle()
        waiting.cancel()
        await running
        await follow(loop, "c", 1)
        assert [arguments[0] for method, arguments in gang.calls if method == "begin"] == ["a", "c"]

    run(body())


def test_a_full_queue_refuses_with_retry_after() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(), max_jobs=2)
        tasks = [asyncio.create_task(follow(loop, name, 200)) for name in "ab"]
        await settle()
        with pytest.raises(OverloadedError) as caught:
            await follow(loop, "c", 1)
        assert caught.value.retry_after_s >= 1
        await asyncio.gather(*tasks)
        await follow(loop, "c", 1)

    run(body())


def test_a_refused_request_does_not_affect_the_next() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(), max_jobs=2)
        with pytest.raises(RequestError, match="666"):
            await follow(loop, "a", 5, seed=666)
        assert isinstance((await follow(loop, "b", 5))[-1], Denoised)
        assert loop.failure is None

    run(body())


def test_a_failed_gang_fails_every_request_permanently() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(fail_at_step=1), max_jobs=4)
        results = await asyncio.gather(*(follow(loop, name, 50) for name in "abc"), return_exceptions=True)
        assert all(isinstance(result, GangFailed) for result in results)
        assert loop.failure is not None
        with pytest.raises(GangFailed, match="a rank died"):
            await follow(loop, "d", 1)

    run(body())


def test_a_request_past_its_deadline_fails() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang)

        async def too_slow() -> None:
            async for _ in loop.submit("a", request(1000), 0.3):
                pass

        task = asyncio.create_task(too_slow())
        while not gang.calls_of("step"):
            await asyncio.sleep(0.01)
        assert isinstance((await follow(loop, "b", 5))[-1], Denoised)
        assert "a" not in gang.progress
        with pytest.raises(DeadlineExceeded):
            await task
        assert 0 < sum(arguments[1] for arguments in gang.calls_of("step") if arguments[0] == "a") < 1000

    run(body())


@pytest.mark.parametrize("limit_s", [60.0, 0.2], ids=["its caller leaves", "its time is up"])
def test_a_long_step_is_left_between_layers(limit_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "_ABANDON_AFTER_S", 0.05)

    async def body() -> None:
        gang = FakeGang(long_steps_of="long")
        loop = loop_on(gang, first_step_timeout_s=30.0)

        async def follow_long() -> None:
            async for _ in loop.submit("long", request(5), limit_s):
                pass

        task = asyncio.create_task(follow_long())
        await until(lambda: bool(gang.calls_of("step")))
        if limit_s > 1:
            task.cancel()
        assert isinstance((await follow(loop, "next", 5))[-1], Denoised)
        assert loop.failure is None
        assert "long" not in gang.progress
        with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
            await task

    run(body())


def test_a_rank_that_does_not_answer_about_its_layers_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "_ABANDON_AFTER_S", 0.0)

    async def body() -> None:
        gang = FakeGang(step_s=0.2, gate_error=TimeoutError())
        loop = loop_on(gang)
        task = asyncio.create_task(follow(loop, "a", 1000))
        await until(lambda: bool(gang.calls_of("step")))
        task.cancel()
        assert isinstance((await follow(loop, "b", 1))[-1], Denoised)

    run(body())


def test_late_requests_are_not_started() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang)
        running = asyncio.create_task(follow(loop, "a", 60))
        while not gang.calls_of("step"):
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded):
            async for _ in loop.submit("late", request(5), 0.05):
                pass
        await running
        assert [arguments[0] for arguments in gang.calls_of("begin")] == ["a"]

    run(body())


def test_out_of_memory_refuses_the_request_and_keeps_the_gang() -> None:
    async def body() -> None:
        gang = FakeGang(no_memory_at_step=1)
        loop = loop_on(gang)
        good = asyncio.create_task(follow(loop, "good", 50))
        with pytest.raises(OutOfMemory):
            await follow(loop, "at once", 5, seed=668)
        with pytest.raises(OutOfMemory):
            await follow(loop, "large", 5)
        assert isinstance((await good)[-1], Denoised)
        assert loop.failure is None
        assert gang.ends == []

    run(body())


def test_only_the_running_request_is_charged_with_a_failure() -> None:
    async def body() -> None:
        gang = FakeGang(fail_at_step=1)
        loop = loop_on(gang)
        names = ("running", "waiting", "waiting too")
        results = await asyncio.gather(*(follow(loop, name, 50) for name in names), return_exceptions=True)
        assert [type(result) for result in results] == [GangFailed, GangLost, GangLost]
        with pytest.raises(GangLost):
            await follow(loop, "later", 1)
        assert gang.ends == [True]

    run(body())


def test_partial_out_of_memory_fails_the_gang_without_a_retry() -> None:
    class Disagreeing(FakeGang):
        async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
            if method == "step":
                raise GangFailed("step", "step() raised OutOfMemory", 1) from OutOfMemory("of 1 GiB")
            return await super().call_or_refuse(method, *arguments, phase=phase, timeout_s=timeout_s)

    async def body() -> None:
        loop = loop_on(Disagreeing())
        results = await asyncio.gather(*(follow(loop, name, 50) for name in "ab"), return_exceptions=True)
        assert [type(result) for result in results] == [OutOfMemory, GangLost]

    run(body())


def test_idle_ranks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(FakeGang):
        async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
            if method == "describe":
                raise GangFailed("idle", "died in describe()", 2)
            return await super().call(method, *arguments, phase=phase, timeout_s=timeout_s)

    monkeypatch.setattr(leader_loop, "_IDLE_S", 0.05)

    async def body() -> None:
        gang = Dying()
        loop = loop_on(gang)
        await follow(loop, "a", 3)
        while loop.failure is None:
            await asyncio.sleep(0.01)
        assert loop.failure.rank == 2
        assert gang.ends == [True]

    run(body())


def test_an_unexpected_error_fails_the_gang_without_hanging() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(), max_jobs=4)
        with pytest.raises(GangFailed, match="ZeroDivisionError: a bug"):
            await follow(loop, "a", 5, seed=667)
        assert loop.failure is not None

    run(body())


def test_one_rank_that_raises_in_a_step_fails_the_gang_not_the_request() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(raise_at_step=1))
        with pytest.raises(GangFailed, match="own trouble"):
            await follow(loop, "a", 5)
        assert loop.failure is not None

    run(body())


def test_an_image_passes_every_video_at_the_next_quantum() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.001, reported_step_s=0.01)
        loop = loop_on(gang, max_jobs=9)
        videos = [asyncio.create_task(follow(loop, f"video {index}", 60)) for index in range(9)]
        while not gang.calls_of("step"):
            await asyncio.sleep(0.001)
        num_quanta = len(gang.calls_of("step"))
        image = await follow(loop, "image", 10, shape=IMAGE)
        assert image[0] == QueuePosition(0, os.getpid())
        assert isinstance(image[-1], Denoised)
        # The running quantum, and one more at most.
        assert [arguments[0] for arguments in gang.calls_of("step")].index("image") <= num_quanta + 1
        with pytest.raises(OverloadedError, match="requests for videos of one transformer gang: all 9"):
            await follow(loop, "one too many", 1)
        for video in await asyncio.gather(*videos):
            assert steps_of(video) == list(range(1, 61))
        assert gang.list_turns()[:3] == ["video 0", "image", "video 0"]
        # No other request overtakes.
        assert [name for name in gang.list_turns() if name != "image"][1:] == [f"video {index}" for index in range(9)]

    run(body())


def test_a_full_class_does_not_block_the_other() -> None:
    async def body() -> None:
        loop = loop_on(FakeGang(step_s=0.01), max_jobs=1)
        video = asyncio.create_task(follow(loop, "video", 40))
        await settle()
        assert isinstance((await follow(loop, "image", 3, shape=IMAGE))[-1], Denoised)
        await video

    run(body())


def test_a_started_request_is_parked_and_resumed() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang, max_held_bytes=250)  # a video holds 200, an image 100
        video = asyncio.create_task(follow(loop, "video", 60))
        while not gang.calls_of("step"):
            await asyncio.sleep(0.001)
        assert isinstance((await follow(loop, "image", 10, shape=IMAGE))[-1], Denoised)
        assert gang.max_begun == 1
        assert steps_of(await video) == list(range(1, 61)), "no step is lost, none is done twice"
        begun = [
            (job_id, None if state is None else int(state.array()[0]))
            for job_id, _, _, state, _, _ in gang.calls_of("begin")
        ]
        assert [job_id for job_id, _ in begun] == ["video", "image", "video"]
        assert begun[0][1] is None
        assert begun[2][1] is not None
        assert begun[2][1] > 0

    run(body())


def test_within_the_bound_nothing_is_parked() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang, max_held_bytes=300)
        video = asyncio.create_task(follow(loop, "video", 60))
        while not gang.calls_of("step"):
            await asyncio.sleep(0.001)
        await follow(loop, "image", 10, shape=IMAGE)
        await video
        assert gang.max_begun == 2
        assert gang.calls_of("read_state") == []

    run(body())


def test_states_are_saved_periodically_and_requests_resume_from_one() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.02)
        updates = await follow(loop_on(gang, save_period_s=0.1), "a", 60)
        saved = [update for update in updates if isinstance(update, SavedState)]
        assert saved
        assert all(int(it.state.array()[0]) == it.step for it in saved)
        again = FakeGang()
        rest = await follow(loop_on(again), "a/2", 60, state=saved[-1].state)
        assert steps_of(rest) == list(range(saved[-1].step + 1, 61))

    run(body())


def test_the_leader_decides_which_prompts_are_cached() -> None:
    async def body() -> None:
        gang = FakeGang(request_memory=RequestMemory(1, 0, 0, 0, 8, 1))
        loop = loop_on(gang, text_cache_bytes=8)
        first = DenoiseRequest((1,), (9,), IMAGE, 24.0, 1, 1.0, "native", 3.0, 0)
        second = DenoiseRequest((2,), (9,), IMAGE, 24.0, 1, 1.0, "native", 3.0, 0)
        for job_id, job in (("a", first), ("b", second)):
            async for _ in loop.submit(job_id, job, 60.0):
                pass
        one, two = ((text_key((number,))) for number in (1, 2))
        assert [orders for _, _, orders, *_ in gang.calls_of("begin")] == [
            PromptOrders((), frozenset([one])),
            PromptOrders((one,), frozenset([two])),
        ]

    run(body())


def test_the_meter_records_quanta_waits_prompts_and_busy_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang_meter._PERIOD_S", 0.0)
    monkeypatch.setattr(leader_loop, "_IDLE_S", 0.02)

    async def body() -> None:
        gang, meter = FakeGang(request_memory=RequestMemory(1, 0, 0, 0, 8, 1)), CallRecorder()
        loop = loop_on(gang, meter, text_cache_bytes=100)
        for job_id in ("a", "b"):
            await follow(loop, job_id, 8)
        await follow(loop, "c", 8, shape=IMAGE)
        assert sum(num_steps for _, num_steps, _ in meter.calls_of("record_steps")) == 24
        assert {lane for lane, *_ in meter.calls_of("record_steps")} == {"video", "image"}
        assert all(seconds > 0 for *_, seconds in meter.calls_of("record_steps"))
        assert [lane for lane, _ in meter.calls_of("record_gang_wait")] == ["video", "video", "image"]
        assert meter.calls_of("count_prompt_lookups") == [(0, 1), (1, 0), (1, 0)]
        shares = [share for (share,) in meter.calls_of("set_busy_share")]
        assert any(share > 0.5 for share in shares)
        # Set while idle too: a gauge that is not refreshed expires.
        async with asyncio.timeout(20):
            while meter.calls_of("set_busy_share")[-1][0] != 0.0:
                await asyncio.sleep(0.01)

    run(body())


def test_the_request_id_reaches_the_ranks_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ray.serve")

    async def body() -> None:
        gang, origin = FakeGang(fail_at_step=1), LogOrigin("otter-1", "video_gen_1", 2)
        with pytest.raises(GangFailed):
            async for _ in loop_on(gang).submit("a", request(8), 60.0, origin=origin):
                pass
        assert gang.calls_of("begin")[0][-1] == origin
        lines = [vars(record) for record in caplog.records]
        assert [line["event"] for line in lines] == ["gang began", "gang failed"]
        assert all(line.items() >= vars(origin).items() for line in lines)

    run(body())


def test_the_first_step_has_no_deadline_and_later_ones_follow_it() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.1)
        await follow(loop_on(gang, first_step_timeout_s=77.0, quantum_timeout_s=1.0), "a", 8)
        timeouts_s = [timeout_s for method, timeout_s in gang.timeouts_s if method in ("begin", "step")]
        assert timeouts_s[:2] == [77.0, 77.0]
        assert all(3.0 < timeout_s < 10.0 for timeout_s in timeouts_s[2:]), "twenty times a quantum"
        fast = FakeGang(step_s=0.001)
        await follow(loop_on(fast, quantum_timeout_s=33.0), "a", 400)
        assert {timeout_s for method, timeout_s in fast.timeouts_s[2:] if method == "step"} == {33.0}

    run(body())


def test_saving_takes_a_small_share_of_the_time_and_waits_for_its_reader() -> None:
    async def body() -> None:
        slow = FakeGang(step_s=0.01, save_s=0.05)
        updates = await follow(loop_on(slow, save_period_s=0.01), "a", 150)
        assert len([update for update in updates if isinstance(update, SavedState)]) <= 2, "one in a second of work"

        gang = FakeGang(step_s=0.01)
        loop = loop_on(gang, save_period_s=0.01)
        stalled = loop.submit("a", request(200), 60.0)
        assert await anext(stalled) == QueuePosition(0, os.getpid())
        while len(gang.calls_of("step")) < 6:  # no one reads the events
            await asyncio.sleep(0.01)
        assert len(gang.calls_of("read_state")) <= 1
        await stalled.aclose()  # type: ignore[attr-defined]

    run(body())


MAP = PreviewMap(((1.0, 0.0, 0.0),), (0.0, 0.0, 0.0))


class GatedGang(FakeGang):
    """Runs one step per quantum, each when the gate opens."""

    gate: asyncio.Semaphore


def make_gang(num_open: int, **fields: Any) -> GatedGang:
    return GatedGang(reported_step_s=1.0, gate=asyncio.Semaphore(num_open), **fields)


def previewing(loop: EngineLoop, num_steps: int, num_previews: int, state: Any = None) -> AsyncIterator[Any]:
    order = PreviewOrder(num_previews, duration_s=2.0, preview_map=MAP)
    return loop.submit("a", request(num_steps), 60.0, state, previews=order)


def test_with_steps_held_by_a_gate_every_step_shows_another_preview() -> None:
    async def body() -> None:
        gang = make_gang(0)
        updates = previewing(loop_on(gang), 4, 3)
        assert await anext(updates) == QueuePosition(0, os.getpid())
        seen = []
        for step in (1, 2, 3):
            gang.gate.release()
            done = await anext(updates)
            assert (type(done), done.step) == (StepDone, step)
            # The next step waits at the gate; the preview does not.
            made = await anext(updates)
            assert (type(made), made.step, made.sigma) == (PreviewReady, step, 0.5)
            with PIL.Image.open(io.BytesIO(made.image)) as image:
                assert (image.format, image.size) == ("WEBP", (256, 192))
                seen.append(np.asarray(image.convert("RGB")).mean())
        assert np.allclose(seen, [20, 40, 60], atol=3)
        gang.gate.release()
        assert [type(update) async for update in updates] == [StepDone, Denoised], "after the last step comes the clip"
        assert [arguments[1:] for arguments in gang.calls_of("preview")] == [(MAP, engine_loop.MAX_FRAMES)] * 3

    run(body())


@pytest.mark.parametrize("num_previews", [1, 3, 32])
def test_previews_are_spread_over_the_steps_and_none_comes_after_the_last(
    num_previews: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "animate_webp", lambda frames, fps: b"webp")

    async def body() -> None:
        gang = FakeGang(step_s=0.002, reported_step_s=0.03)
        updates = [update async for update in previewing(loop_on(gang), 100, num_previews)]
        assert steps_of(updates) == list(range(1, 101))
        steps = [update.step for update in updates if isinstance(update, PreviewReady)]
        assert 1 <= len(steps) <= num_previews
        assert steps == sorted(set(steps))
        assert isinstance(updates[-2], StepDone), "a preview after the last step"
        assert isinstance(updates[-1], Denoised)
        order = [update.step for update in updates if isinstance(update, StepDone | PreviewReady)]
        for index, update in enumerate(u for u in updates if isinstance(u, StepDone | PreviewReady)):
            assert not isinstance(update, PreviewReady) or update.step in order[:index]

    run(body())


def test_without_previews_none_is_made() -> None:
    async def body() -> None:
        gang = FakeGang()
        await follow(loop_on(gang), "a", 100)
        assert gang.calls_of("preview") == []

    run(body())


def test_while_a_preview_is_encoded_steps_go_on_without_another(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()

    def slow(frames: Any, fps: float) -> bytes:
        assert finish.wait(20)
        return b"late"

    monkeypatch.setattr(engine_loop, "animate_webp", slow)

    async def body() -> None:
        gang = make_gang(4)
        updates = previewing(loop_on(gang), 6, 5)
        assert [(await anext(updates)) for _ in range(5)][1:] == [
            StepDone(n, 6, 0.5, 0.1, os.getpid()) for n in (1, 2, 3, 4)
        ]
        assert len(gang.calls_of("preview")) == 1, "more than one preview in the making"
        finish.set()
        late = await anext(updates)
        assert (late.step, late.image) == (1, b"late")
        gang.gate.release()
        # Skipped previews do not follow: one comes, of the newest step.
        assert [(await anext(updates)).step for _ in range(2)] == [5, 5]
        gang.gate.release()
        assert [type(update) async for update in updates] == [StepDone, Denoised]

    run(body())


def test_a_preview_unfinished_at_the_last_step_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()
    monkeypatch.setattr(engine_loop, "animate_webp", lambda frames, fps: b"late" if finish.wait(20) else b"")

    async def body() -> None:
        loop = loop_on(FakeGang(reported_step_s=1.0))
        updates = [type(update) async for update in previewing(loop, 2, 1)]
        assert updates == [QueuePosition, StepDone, StepDone, Denoised]
        finish.set()
        assert isinstance((await follow(loop, "b", 2))[-1], Denoised)

    run(body())


def test_a_preview_finished_during_the_fetch_of_latents_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()
    monkeypatch.setattr(engine_loop, "animate_webp", lambda frames, fps: b"late" if finish.wait(20) else b"")

    class Fetching(FakeGang):
        async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
            if method == "latents":
                assert loop._encoding is not None
                assert not loop._encoding.done()
                finish.set()
                await loop._encoding
            return await super().call(method, *arguments, phase=phase, timeout_s=timeout_s)

    loop: EngineLoop

    async def body() -> None:
        nonlocal loop
        loop = loop_on(Fetching(reported_step_s=1.0))
        assert [type(update) async for update in previewing(loop, 2, 1)] == [
            QueuePosition,
            StepDone,
            StepDone,
            Denoised,
        ]

    run(body())


def test_a_failed_preview_ends_only_the_previews(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(frames: Any, fps: float) -> bytes:
        raise MediaError("no WebP here")

    async def body() -> None:
        for rank_fails in (True, False):
            gang = make_gang(1, no_previews_from_step=1 if rank_fails else None)
            monkeypatch.setattr(engine_loop, "animate_webp", fail)
            loop = loop_on(gang)
            caplog.clear()
            updates = previewing(loop, 4, 3)
            assert [type(await anext(updates)) for _ in range(2)] == [QueuePosition, StepDone]
            reason = "another VAE's map" if rank_fails else "MediaError: no WebP here"
            assert await anext(updates) == PreviewsOff(reason, os.getpid())
            for _ in range(3):
                gang.gate.release()
            assert [type(update) async for update in updates] == [StepDone, StepDone, StepDone, Denoised]
            assert len(gang.calls_of("preview")) == 1, "asked again after a failure"
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert "goes on without previews" in caplog.text
            assert loop.failure is None

    run(body())


def test_a_rank_that_dies_during_a_preview_fails_the_gang() -> None:
    class Dying(FakeGang):
        async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
            if method == "preview":
                raise GangFailed("step", "died in preview()", 0)
            return await super().call(method, *arguments, phase=phase, timeout_s=timeout_s)

    async def body() -> None:
        with pytest.raises(GangFailed, match="died in preview"):
            _ = [update async for update in previewing(loop_on(Dying(reported_step_s=1.0)), 4, 3)]

    run(body())


def test_a_resumed_request_is_previewed_from_its_step() -> None:
    async def body() -> None:
        gang = make_gang(1)
        state = TensorEnvelope.of_array(np.array([6], np.int64))
        updates = previewing(loop_on(gang), 9, 2, state)  # every third step
        assert [getattr(await anext(updates), "step", 0) for _ in range(3)] == [0, 7, 7]
        gang.gate.release()
        gang.gate.release()
        assert [type(update) async for update in updates] == [StepDone, StepDone, Denoised]

    run(body())
