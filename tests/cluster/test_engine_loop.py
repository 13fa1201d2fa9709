"""The leader's loop on a gang that is not there: order, positions, cancelling, bounds, failure. Without Ray."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cluster.engine_loop import EngineLoop, Queued
from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed, OverloadedError
from cluster.rank import StepReport
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import RequestError
from cosmos3_core.shapes import LatentShape


def request(num_steps: int, seed: int = 0) -> DenoiseRequest:
    return DenoiseRequest((1,), (1,), LatentShape(1, 1, 1), 24.0, num_steps, 1.0, "native", 3.0, seed)


@dataclass
class FakeGang:
    """Answers like a gang of one; counts what it was asked."""

    step_s: float = 0.001
    fail_at_step: int | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)

    async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        assert timeout_s > 0
        self.calls.append((method, arguments))
        await asyncio.sleep(0)
        job_id = arguments[0]
        if method == "begin":
            if arguments[1].seed == 667:
                raise ZeroDivisionError("a bug")
            if arguments[1].seed == 666:
                raise RequestError("seed", 666, "another one")
            self.progress[job_id] = (0, arguments[1].num_inference_steps)
        elif method == "step":
            done, total = self.progress[job_id]
            if self.fail_at_step is not None and done >= self.fail_at_step:
                raise GangFailed("step", "a rank died")
            count = min(arguments[1], total - done)
            await asyncio.sleep(self.step_s * count)
            self.progress[job_id] = (done + count, total)
            return [StepReport(done + count, total, 0.5, self.step_s * count, os.getpid())]
        elif method == "latents":
            return [TensorEnvelope.of_array(np.zeros(1, np.float32))]
        elif method == "end":
            self.progress.pop(job_id, None)
        return [None]


def run(body: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(body, 30))


async def follow(loop: EngineLoop, job_id: str, num_steps: int, seed: int = 0) -> list[Any]:
    return [update async for update in loop.submit(job_id, request(num_steps, seed), time.time() + 60)]


def test_a_request_gets_its_position_its_steps_and_its_latents() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = EngineLoop(gang, max_jobs=2, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        updates = await follow(loop, "a", 1000)
        assert updates[0] == Queued(0)
        reports = [update for update in updates if isinstance(update, StepReport)]
        assert [report.step for report in reports] == sorted({report.step for report in reports})
        assert reports[0].step == 1
        assert reports[-1].step == 1000
        # About a quarter second each: not one by one, not all at once.
        assert 3 <= len(reports) <= 20
        assert isinstance(updates[-1], TensorEnvelope)
        await asyncio.sleep(0.01)
        assert gang.progress == {}
        assert loop.num_jobs == 0

    run(body())


def test_requests_run_in_order_and_positions_count_down() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = EngineLoop(gang, max_jobs=3, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        results = await asyncio.gather(*(follow(loop, name, 300) for name in "abc"))
        positions = [[update.position for update in updates if isinstance(update, Queued)] for updates in results]
        assert [seen[-1] for seen in positions] == [0, 1, 1]
        assert positions[2][0] == 2
        begun = [arguments[0] for method, arguments in gang.calls if method == "begin"]
        assert begun == ["a", "b", "c"]

    run(body())


def test_a_cancelled_request_leaves_at_the_next_quantum_and_the_next_one_runs() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = EngineLoop(gang, max_jobs=3, first_quantum_timeout_s=10)  # type: ignore[arg-type]

        async def leave_early() -> None:
            async for update in loop.submit("a", request(1000), time.time() + 60):
                if isinstance(update, StepReport):
                    return

        waiting = asyncio.create_task(follow(loop, "waiting", 10))
        first = asyncio.create_task(leave_early())
        await first
        assert (await waiting)[-1].shape == (1,)
        done, total = gang.progress.get("a", (0, 1000))
        assert done < total
        assert isinstance((await follow(loop, "b", 5))[-1], TensorEnvelope)
        assert "a" not in gang.progress

    run(body())


def test_a_request_cancelled_while_it_waits_never_begins() -> None:
    async def body() -> None:
        gang = FakeGang()
        loop = EngineLoop(gang, max_jobs=3, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        running = asyncio.create_task(follow(loop, "a", 500))
        waiting = asyncio.create_task(follow(loop, "b", 500))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await running
        await follow(loop, "c", 1)
        assert [arguments[0] for method, arguments in gang.calls if method == "begin"] == ["a", "c"]

    run(body())


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    async def body() -> None:
        loop = EngineLoop(FakeGang(), max_jobs=2, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        tasks = [asyncio.create_task(follow(loop, name, 200)) for name in "ab"]
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError) as caught:
            await follow(loop, "c", 1)
        assert caught.value.retry_after_s >= 1
        await asyncio.gather(*tasks)
        await follow(loop, "c", 1)

    run(body())


def test_a_request_that_is_refused_does_not_harm_the_next() -> None:
    async def body() -> None:
        loop = EngineLoop(FakeGang(), max_jobs=2, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="666"):
            await follow(loop, "a", 5, seed=666)
        assert isinstance((await follow(loop, "b", 5))[-1], TensorEnvelope)
        assert loop.failure is None

    run(body())


def test_a_failed_gang_fails_every_request_at_once_and_for_good() -> None:
    async def body() -> None:
        loop = EngineLoop(FakeGang(fail_at_step=1), max_jobs=4, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        results = await asyncio.gather(*(follow(loop, name, 50) for name in "abc"), return_exceptions=True)
        assert [type(result) for result in results] == [GangFailed] * 3
        assert loop.failure is not None
        with pytest.raises(GangFailed, match="a rank died"):
            await follow(loop, "d", 1)

    run(body())


def test_a_request_past_its_deadline_is_dropped_though_nobody_left() -> None:
    async def body() -> None:
        gang = FakeGang(step_s=0.01)
        loop = EngineLoop(gang, max_jobs=3, first_quantum_timeout_s=10)  # type: ignore[arg-type]

        async def abandoned() -> None:
            async for _ in loop.submit("a", request(100_000), time.time() + 0.3):
                pass

        task = asyncio.create_task(abandoned())
        await asyncio.sleep(0.02)
        assert isinstance((await follow(loop, "b", 5))[-1], TensorEnvelope)
        assert "a" not in gang.progress
        task.cancel()


def test_a_bug_of_our_own_fails_the_gang_and_does_not_hang() -> None:
    async def body() -> None:
        loop = EngineLoop(FakeGang(), max_jobs=4, first_quantum_timeout_s=10)  # type: ignore[arg-type]
        with pytest.raises(GangFailed, match="ZeroDivisionError: a bug"):
            await follow(loop, "a", 5, seed=667)
        assert loop.failure is not None

    run(body())
