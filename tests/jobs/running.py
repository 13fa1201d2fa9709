"""A runner with a real database and fake pipelines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.envelope import TensorEnvelope
from cluster.errors import OutOfMemory
from cluster.events import StepDone
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest
from deployments.config import JobsConfig
from deployments.director.admission import Admission, RequestCheck
from deployments.director.leases import StopReason
from deployments.director.progress import StageDeadlines
from deployments.director.runner import JobRunner
from deployments.jobs.estimates import CostModel
from deployments.jobs.job import Job, JobState, Lane, SubmitOptions, new_job_id
from deployments.jobs.service import JobService
from deployments.jobs.store import JobStore
from deployments.media.job_files import JobFiles
from deployments.media.objects import DirectoryObjects
from deployments.media.store import MediaStore
from deployments.messages import FileStarted, Finished, LatentsReady, RequestContext, StateSaved

SMALL = GenerationRequest(prompt="a car", num_frames=5, height=32, width=32, num_inference_steps=4)
IMAGE = replace(SMALL, num_frames=1)
DEADLINE_S = 30.0
NO_DEADLINES = StageDeadlines(*[(math.inf, math.inf)] * 4)


class FakePipeline:
    """A pipeline of four steps, which wait for the stage's gate, and a result."""

    def __init__(self, stage: FakeStage, request: Any, context: RequestContext, job: Job, resume_from: Any) -> None:
        self.stage, self.request, self.context, self.job = stage, request, context, job
        self.resume_from = resume_from
        self.on_saved: Callable[[int, TensorEnvelope], None]
        self.was_stopped = False

    async def events(self) -> AsyncIterator[Any]:
        try:
            first = 1 if self.resume_from is None else 1 + int(self.resume_from.data[0])
            for step in range(first, 5):
                await self.stage.gate.wait()
                if self.stage.fails_at == step:
                    raise self.stage.failure
                yield StepDone(step, 4, 1 - step / 4, 0.01, 77)
                state = TensorEnvelope.of_array(np.full(8, step, np.uint8))
                self.on_saved(step, state)
                yield StateSaved(step, 8, 78)
                if self.stage.holds_after == step:
                    await asyncio.sleep(DEADLINE_S)
            yield LatentsReady(0.1, ("video",), 78, (77,))
            yield FileStarted("0" * 32, "video/mp4", 79)
            if self.stage.holds_at_end:
                await asyncio.sleep(DEADLINE_S)
            yield make_finished(self.context, self.request)
        except (asyncio.CancelledError, GeneratorExit):
            self.was_stopped = True
            raise


def make_finished(context: RequestContext, request: Any) -> Finished:
    return Finished(
        request_id=context.request_id,
        job_id=context.job_id,
        mode=request.mode,
        media_id="0" * 32,
        media_type="video/mp4",
        num_bytes=10,
        num_frames=request.num_frames,
        fps=request.fps,
        height=request.height,
        width=request.width,
        seed=request.seed,
        frames_sha256="abc",
        negative_origin="given",
        notes=(),
        stage_seconds={"total": 1.0},
    )


class FakeStage:
    """Makes pipelines and holds them at a gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.pipelines: list[FakePipeline] = []
        self.fails_at = 0
        self.holds_after = 0
        self.holds_at_end = False
        self.failure: Exception = OutOfMemory("2 GiB")

    def make_pipeline(
        self, request: Any, context: RequestContext, job: Job, resume_from: Any, on_saved: Callable[..., None]
    ) -> FakePipeline:
        pipeline = FakePipeline(self, request, context, job, resume_from)
        pipeline.on_saved = on_saved
        self.pipelines.append(pipeline)
        return pipeline


class Service:
    """The inside of a Director; several may share a directory."""

    def __init__(self, directory: Path, layout: CheckpointLayout, **changed: Any) -> None:
        self.store = JobStore.open(f"sqlite:///{directory}/jobs.sqlite3")
        self.media = MediaStore(directory / "media", 2**30, 3600)
        self.files = JobFiles(DirectoryObjects(directory / "media"))
        self.stage = FakeStage()
        check = RequestCheck(layout, is_sound_offered=True)
        cost = CostModel.of(layout.geometry, layout.transformer)
        deadlines = changed.pop("deadlines", NO_DEADLINES)
        max_running = changed.pop("max_running", {Lane.IMAGE: 2, Lane.VIDEO: 2})
        config = JobsConfig(max_queued=50, max_queued_per_key=50, classes={"standard": 1.0}).model_copy(
            update={
                "max_running_images": max_running[Lane.IMAGE],
                "max_running_videos": max_running[Lane.VIDEO],
                "run_timeout_s": 60.0,
                "lease_s": 1.0,
                "max_attempts": 2,
                "checkpoint_period_s": 0.0,
                "poll_s": 0.05,
                **changed,
            }
        )
        self.admission = Admission(self.store, self.files, check, cost, "nano", config)
        self.jobs = JobService(self.store, self.files, self.media, 8)
        self.runner = JobRunner(self.jobs, "nano", config, check, deadlines, self.stage.make_pipeline)

    async def submit(self, request: GenerationRequest = SMALL, options: SubmitOptions = SubmitOptions()) -> Job:  # noqa: B008
        context = RequestContext.new(None, 60, new_job_id())
        job = await self.admission.accept(request, options, context)
        self.runner.wake()
        return job

    async def stream(self, request: GenerationRequest = SMALL, limit_s: float = 60.0) -> AsyncIterator[Any]:
        """Submit an attached job and stream its events, as the Director does."""
        context = RequestContext.new(None, limit_s, new_job_id())
        self.runner.announce(context.job_id, context)
        try:
            job = await self.admission.accept(request, SubmitOptions(), context, self.runner.runner_id)
            async with aclosing(self.runner.follow(job)) as events:
                async for event in events:
                    yield event
        finally:
            self.runner.leave(context.job_id)

    async def until(self, job_id: str, *states: JobState) -> Job:
        deadline_s = time.monotonic() + DEADLINE_S
        while (job := self.store.get(job_id)) is None or job.state not in states:
            assert time.monotonic() < deadline_s, job
            await asyncio.sleep(0.02)
        return job

    def die(self) -> None:
        """Stop like SIGKILL: no message, no cleanup."""
        for claimed in self.runner._claimed.values():
            claimed.stop_reason = StopReason.LOST  # so nothing is recorded
        for task in self.runner._tasks:
            task.cancel()


@pytest.fixture
def serve(tmp_path: Path, tiny_nano: Path) -> Callable[..., None]:
    """Run a test's coroutine with a factory of services on one directory."""
    layout = CheckpointLayout.open(tiny_nano)

    def run(body: Callable[[Callable[..., Service]], Coroutine[Any, Any, None]]) -> None:
        services: list[Service] = []

        def make(**changed: Any) -> Service:
            services.append(Service(tmp_path, layout, **changed))
            return services[-1]

        async def whole() -> None:
            try:
                await asyncio.wait_for(body(make), 2 * DEADLINE_S)
            finally:
                for service in services:
                    service.die()

        asyncio.run(whole())

    return run
