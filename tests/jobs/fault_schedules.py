"""A Director's runners under faults: real runners, store, media store and archive; a fake gang; virtual time.

A schedule says when which boundary fails. Every call through a boundary asks the :class:`FaultLayer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy
from sqlalchemy import Connection

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed
from cluster.events import Event, StepDone
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from deployments.config import JobsConfig
from deployments.director.admission import Admission, RequestCheck
from deployments.director.leases import StopReason
from deployments.director.retries import retry_stage
from deployments.director.runner import JobRunner
from deployments.errors import JobsError
from deployments.jobs.database import Database
from deployments.jobs.estimates import CostModel
from deployments.jobs.job import Job, JobState, SubmitOptions, new_job_id
from deployments.jobs.schema import JOBS
from deployments.jobs.service import JobService
from deployments.jobs.store import JobStore
from deployments.media.job_files import JobFiles
from deployments.media.layout import new_media_id
from deployments.media.objects import DirectoryObjects
from deployments.media.store import MediaStore
from deployments.messages import FileStarted, Finished, LatentsReady, RequestContext, StateSaved, Tokenized
from tests.jobs.making import MODEL
from tests.jobs.running import NO_DEADLINES, make_finished
from tests.virtual_time import VirtualClock, run_virtually

NUM_JOBS, NUM_STEPS = 12, 4
STAGES = ("tokenize", "condition", "denoise", "decode", "encode")
BOUNDARIES = ("database", "media store", "archive", *STAGES)
CLASSES = {"interactive": 8.0, "standard": 4.0, "batch": 1.0}
CONFIG = JobsConfig(
    classes=CLASSES,
    max_running_videos=3,
    max_running_images=3,
    lease_s=20.0,
    checkpoint_period_s=2.0,
    poll_s=2.0,
    keep_s=1e6,
)
_MEMORY = Path("/dev/shm")
_MAX_FAULT_S, _LAST_FAULT_S, _LIMIT_S = 90.0, 120.0, 7200.0


@dataclass(frozen=True)
class Window:
    """A time in which a boundary fails. The work is done all the same if only its answer ``is_lost``."""

    boundary: str
    begin_s: float
    end_s: float
    is_lost: bool


@dataclass(frozen=True)
class Schedule:
    """When which boundary fails, when a runner is killed (None: never), and when the wall clock is set by how much."""

    windows: tuple[Window, ...]
    death_s: float | None
    jumps: tuple[tuple[float, float], ...]

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        """Draw a schedule; at most one window of a stage, whose losses may count as attempts."""
        source = random.Random(seed)
        boundaries = [source.choice(BOUNDARIES[:3]) for _ in range(source.randint(0, 3))]
        boundaries += [source.choice(STAGES)] * source.randint(0 if boundaries else 1, 1)
        windows = []
        for boundary in boundaries:
            begin_s = source.uniform(0, _LAST_FAULT_S)
            end_s = begin_s + source.uniform(0.5, _MAX_FAULT_S)
            windows.append(Window(boundary, begin_s, end_s, boundary == "database" and source.random() < 0.3))
        death_s = source.uniform(0, _LAST_FAULT_S) if source.random() < 0.3 else None
        num_jumps = source.choice((0, 0, 1, 2))
        jumps = tuple((source.uniform(0, _LAST_FAULT_S), source.choice((-3600.0, 3600.0))) for _ in range(num_jumps))
        return cls(tuple(windows), death_s, jumps)


@dataclass
class FaultLayer:
    """Fails calls through boundaries, as a schedule says."""

    clock: VirtualClock
    schedule: Schedule
    num_faults: Counter[str] = field(default_factory=Counter)

    def find(self, boundary: str) -> Window | None:
        """Return the window of faults that a boundary is in, if it is in one."""
        for window in self.schedule.windows:
            if window.boundary == boundary and window.begin_s <= self.clock.now_s < window.end_s:
                return window
        return None

    def fail(self, boundary: str) -> Window | None:
        """Return as :meth:`find`, and count a call that fails for it."""
        if window := self.find(boundary):
            self.num_faults[boundary] += 1
        return window

    def check_disk(self, boundary: str) -> None:
        if self.fail(boundary):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FaultyDatabase(Database):
    """A database whose transactions fail, before or after they are committed."""

    layer: FaultLayer

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._failing(), super().reading() as connection:
            yield connection

    @contextmanager
    def writing(self, *, is_queue: bool = False) -> Iterator[Connection]:
        with self._failing(), super().writing(is_queue=is_queue) as connection:
            yield connection

    @contextmanager
    def _failing(self) -> Iterator[None]:
        layer = getattr(self, "layer", None)  # none while it is opened
        window = layer.fail("database") if layer else None
        if window is None or window.is_lost:
            yield
        if window is not None:
            raise JobsError("the database is away")


class FaultyObjects(DirectoryObjects):
    """A directory that fails."""

    def __init__(self, root: Path, layer: FaultLayer, boundary: str) -> None:
        super().__init__(root)
        self._check = lambda: layer.check_disk(boundary)

    def put(self, folder: str, name: str, parts: Any) -> None:
        self._check()
        super().put(folder, name, parts)

    def create(self, folder: str, name: str, data: bytes) -> None:
        self._check()
        super().create(folder, name, data)

    def put_file(self, folder: str, name: str, path: Path) -> None:
        self._check()
        super().put_file(folder, name, path)

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        self._check()
        return super().read(folder, name, start, num_bytes)

    def names(self, folder: str) -> list[str]:
        self._check()
        return super().names(folder)

    def _sync(self, place: Path, *, is_new: bool = True) -> None:
        """Do nothing: no machine crashes here."""


def content_of(job_id: str) -> bytes:
    return hashlib.sha256(job_id.encode()).digest()


class FakePipeline:
    """A pipeline through stages that fail, with the product's retries; its file is a hash of the job's id."""

    def __init__(
        self, world: World, request: ResolvedRequest, context: RequestContext, job: Job, resume_from: Any, on_saved: Any
    ) -> None:
        self._world, self._request, self._context, self._job = world, request, context, job
        self._step = 0 if resume_from is None else int(resume_from.data[0])
        self._on_saved = on_saved
        self._media_id = ""

    async def events(self) -> AsyncIterator[Any]:
        for stage in STAGES:
            work = getattr(self, f"_{stage}")
            async for event in retry_stage(stage, self._context, 3, lambda _, stage=stage, work=work: work()):  # type: ignore[misc]
                yield event
        yield self._make_finished()

    async def _call(self, stage: str, seconds: float) -> None:
        for _ in range(2):  # at its begin, and at its end
            if self._world.layer.fail(stage):
                raise GangFailed(stage, "a rank died", 0)
            await asyncio.sleep(seconds / 2)

    async def _tokenize(self) -> AsyncIterator[Event]:
        await self._call("tokenize", 0.1)
        yield Tokenized(3, 0, "empty", 77)

    async def _condition(self) -> AsyncIterator[Event]:
        await self._call("condition", 0.5)
        return
        yield

    async def _denoise(self) -> AsyncIterator[Event]:
        while self._step < NUM_STEPS:
            await self._call("denoise", 1.0)
            self._step += 1
            yield StepDone(self._step, NUM_STEPS, 1 - self._step / NUM_STEPS, 1.0, 77)
            self._on_saved(self._step, TensorEnvelope.of_array(np.full(8, self._step, np.uint8)))
            yield StateSaved(self._step, 8, 78)
        yield LatentsReady(0.1, ("video",), 78, (77,))

    async def _decode(self) -> AsyncIterator[Event]:
        await self._call("decode", 1.0)
        return
        yield

    async def _encode(self) -> AsyncIterator[Event]:
        media = self._world.media
        self._media_id = new_media_id(self._job.job_id)
        try:
            entry = media.create(self._media_id, "video/mp4", ".mp4", is_live=True)
            yield FileStarted(self._media_id, "video/mp4", 79)
            await self._call("encode", 1.0)
            self._world.layer.check_disk("media store")
            entry.path.write_bytes(content_of(self._job.job_id))
            entry.finish()
        except Exception:
            media.fail(self._media_id, "the encoder failed")
            raise

    def _make_finished(self) -> Finished:
        return replace(make_finished(self._context, self._request), media_id=self._media_id, num_bytes=32)


class World:
    """Two Directors' runners on one database and one media store with an archive."""

    def __init__(self, place: Path, layout: CheckpointLayout, empty: Path, clock: VirtualClock, seed: int) -> None:
        self.clock, self._source = clock, random.Random(seed)
        self.layer = FaultLayer(clock, Schedule.draw(seed))
        shutil.copy(empty, place / "jobs.sqlite3")
        database = FaultyDatabase(f"sqlite:///{place}/jobs.sqlite3")
        database.layer = self.layer
        self.store = JobStore(database, clock.time)
        self.media = MediaStore(place / "media", 2**30, 1e6, f"file://{place}/archive")
        self.media.objects = FaultyObjects(place / "media", self.layer, "media store")
        self.media.archive = FaultyObjects(place / "archive", self.layer, "archive")
        self.files = JobFiles(self.media.archive)
        self.check = RequestCheck(layout, is_sound_offered=True)
        cost = CostModel.of(layout.geometry, layout.transformer)
        self.admission = Admission(self.store, self.files, self.check, cost, MODEL, CONFIG)
        self.jobs = JobService(self.store, self.files, self.media, 8)
        self.runners: list[JobRunner] = []
        self.accepted: list[str] = []
        self.num_deaths: Counter[str] = Counter()

    async def run(self) -> None:
        """Submit jobs, let runners run them, and check what has become of them."""
        self._watch_claims()
        self.runners = [self._start_runner() for _ in range(2)]
        submitting = asyncio.create_task(self._submit_jobs())
        loop = asyncio.get_running_loop()
        for at_s, by_s in self.layer.schedule.jumps:
            loop.call_at(at_s, self.clock.set_forward, by_s)
        if (death_s := self.layer.schedule.death_s) is not None:
            await asyncio.sleep(death_s)
            await self._kill(self.runners.pop(self._source.randrange(2)))
        await submitting
        await asyncio.sleep(_LAST_FAULT_S + _MAX_FAULT_S)
        while self.clock.now_s < _LIMIT_S and not all(job.state.is_final for job in self._read_jobs()):
            await asyncio.sleep(5.0)
        self._check()
        for runner in self.runners:
            self._stop(runner)

    def _start_runner(self) -> JobRunner:
        def make_pipeline(*arguments: Any) -> FakePipeline:
            return FakePipeline(self, *arguments)

        return JobRunner(self.jobs, MODEL, CONFIG, self.check, NO_DEADLINES, make_pipeline)  # type: ignore[arg-type]

    async def _submit_jobs(self) -> None:
        for index in range(NUM_JOBS):
            await asyncio.sleep(self._source.uniform(0, 8))
            request = GenerationRequest(
                prompt=f"job {index}", num_frames=5, height=32, width=32, num_inference_steps=NUM_STEPS
            )
            options = SubmitOptions(service_class=self._source.choice(list(CLASSES)))
            while True:
                with contextlib.suppress(JobsError, OSError):
                    context = RequestContext.new(None, 60, new_job_id())
                    self.accepted.append((await self.admission.accept(request, options, context)).job_id)
                    break
                await asyncio.sleep(5.0)  # it was rejected, and the caller comes again

    async def _kill(self, runner: JobRunner) -> None:
        self.num_deaths.update(runner._claimed.keys())
        self._stop(runner)
        await asyncio.sleep(5.0)
        self.runners.append(self._start_runner())

    def _stop(self, runner: JobRunner) -> None:
        """Stop like SIGKILL: no message, no cleanup."""
        for claimed in runner._claimed.values():
            claimed.stop_reason = StopReason.LOST
        runner.breaker.stop()
        for task in runner._tasks:
            task.cancel()

    def _watch_claims(self) -> None:
        """Check that a job of the queue is claimed before those behind it."""
        claim = self.store.claim

        def claim_first(request: Any) -> Job | None:
            waiting = {} if self.layer.find("database") else self._find_claimable()
            job = claim(request)
            if job is not None and job.job_id in waiting:
                assert waiting[job.job_id] == min(waiting.values()), "the first of the queue"
            return job

        self.store.claim = claim_first  # type: ignore[method-assign]

    def _find_claimable(self) -> dict[str, float]:
        is_claimable = (JOBS.c.state == JobState.QUEUED) & (JOBS.c.retry_at_s <= self.clock.time())
        columns = (JOBS.c.job_id, JOBS.c.queue_order)
        with self._without_faults(), self.store._database.reading() as connection:
            return {
                row.job_id: row.queue_order
                for row in connection.execute(sqlalchemy.select(*columns).where(is_claimable))
            }

    def _read_jobs(self) -> list[Job]:
        with self._without_faults():
            return list(self.store.list("", after=None, limit=100, is_ascending=True).jobs)

    @contextmanager
    def _without_faults(self) -> Iterator[None]:
        database = self.store._database
        layer, database.layer = database.layer, None  # type: ignore[attr-defined]
        try:
            yield
        finally:
            database.layer = layer  # type: ignore[attr-defined]

    def _check(self) -> None:
        jobs = {job.job_id: job for job in self._read_jobs()}
        assert set(self.accepted) <= jobs.keys(), "an accepted job is gone"
        has_stage_faults = any(window.boundary in STAGES for window in self.layer.schedule.windows)
        for job_id, job in jobs.items():
            about = (job.prompt, job.state, job.error_code, job.error_message, job.fault, self.layer)
            assert job.state is JobState.COMPLETED, about
            kinds = Counter(event.kind for event in self.store.find_events({job_id: 0}))
            assert kinds["completed"] == 1, about
            assert self.media.read(self.media.require(job.media_id)) == content_of(job_id), about
            # Each run that its runner's death or lost processes ended may count as an attempt, and no other.
            assert job.attempts <= 1 + self.num_deaths[job_id] + has_stage_faults, (job.attempts, *about)


def run_schedule(seed: int, layout: CheckpointLayout, empty_sqlite: Path) -> Counter[str]:
    """Run a schedule and check what becomes of its jobs; return how many calls of each boundary failed."""

    async def run(clock: VirtualClock) -> Counter[str]:
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as place:
            world = World(Path(place), layout, empty_sqlite, clock, seed)
            try:
                await world.run()
            finally:
                world.store.close()
            return world.layer.num_faults

    return run_virtually(run)
