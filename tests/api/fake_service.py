"""The API's service with a stand-in for the Director: what it accepts is a real job in a real database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from deployments.api.app import build_api
from deployments.api.auth import Authenticator
from deployments.api.bodies import BodyRules
from deployments.api.openapi import make_document
from deployments.api.remote_media import FetchFile
from deployments.api.service import Service
from deployments.api_model import Model
from deployments.config import HttpConfig, JobsConfig
from deployments.director.admission import Admission, RequestCheck
from deployments.director.guardrail_calls import PromptCheck
from deployments.jobs.estimates import CostModel
from deployments.jobs.job import Job, JobState, Lane, Outcome, Progress, SubmitOptions, new_job_id
from deployments.jobs.queue import ClaimRequest
from deployments.jobs.service import JobService
from deployments.jobs.store import JobStore
from deployments.media.job_files import JobFiles
from deployments.media.layout import new_media_id
from deployments.media.store import MediaEntry, MediaStore
from deployments.messages import Accepted, FileStarted, Finished, RequestContext
from tests.api.documented import ApiDocument
from tests.jobs.making import make_lease
from tests.serve_fakes import Method

MODEL = "nano"
UNKNOWN = "video_gen_" + "0" * 32
ID_ROUTES = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("POST", "/remix"),
    ("GET", "/content"),
    ("HEAD", "/content"),
    ("GET", "/content?variant=thumbnail"),
    ("GET", "/content?variant=action"),
    ("GET", "/events"),
]
DEADLINE_S = 60.0
CLASSES = {"interactive": 8.0, "standard": 4.0, "batch": 1.0}
LIMITS = JobsConfig(max_queued=20, max_queued_per_key=2, classes=CLASSES, lease_s=1000.0)


class EvenCost(CostModel):
    """A cost model in which every request takes equally long, so that announced times are constant."""

    def compute_work(self, request: ResolvedRequest) -> float:
        """Return the same work for every request."""
        return 1000.0


class UnlookedPrompts(PromptCheck):
    """A guardrail that passes every prompt; disabling it still needs permission."""

    async def check_at_admission(self, context: RequestContext, prompt: str, *, is_skipped: bool) -> None:
        """Check only whether skipping is allowed."""
        if is_skipped:
            await super().check_at_admission(context, prompt, is_skipped=True)


class FakeDirector:
    """Accepts with the Director's own admission; a request that is waited for gets a file of a few bytes.

    Args:
        layout: layout of the checkpoint.
        jobs: the service of jobs.
        limits: bounds of the queue.
        may_skip_guardrails: whether a request may disable the guardrails.

    Attributes:
        submitted: requests with their options.
        gate: awaited before a file that is waited for is made.
        actions: actions of every result.
        error: raised instead of accepting.
    """

    def __init__(
        self, layout: CheckpointLayout, jobs: JobService, limits: JobsConfig, *, may_skip_guardrails: bool
    ) -> None:
        self.admission = Admission(
            store=jobs.store,
            files=jobs.files,
            check=RequestCheck(layout, is_sound_offered=True),
            cost=EvenCost.of(layout.geometry, layout.transformer),
            model=MODEL,
            config=limits,
            prompt_check=UnlookedPrompts(None, DEADLINE_S, may_skip_guardrails),
        )
        self._jobs = jobs
        self.submitted: list[tuple[GenerationRequest, SubmitOptions]] = []
        self.gate: Callable[[], Coroutine[Any, Any, Any]] | None = None
        self.actions: Any = None
        self.error: BaseException | None = None
        self.submit = Method(self._submit)
        self.remix = Method(self._remix)
        self.stream = Method(self._stream)

    async def _submit(self, request: GenerationRequest, options: SubmitOptions, attached_to: str | None = None) -> Job:
        if self.error is not None:
            raise self.error
        context = RequestContext.new(options.request_id, DEADLINE_S, new_job_id())
        job = await self.admission.accept(request, options, context, attached_to)
        self.submitted.append((request, options))
        return job

    async def _remix(self, job_id: str, prompt: str, options: SubmitOptions) -> Job:
        earlier = await self._jobs.get(job_id, options.owner)
        return await self._submit(*await self.admission.load_remix(earlier, prompt, options))

    async def _stream(
        self, request: GenerationRequest, options: SubmitOptions, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        job = await self._submit(request, options, "this-one")
        yield Accepted(
            job.request_id, job.job_id, job.num_steps, job.num_frames, job.seed, tuple(job.notes), os.getpid()
        )
        if job.media_type == "video/mp4":
            media_id = new_media_id(job.job_id)
            entry = self._jobs.media.create(media_id, job.media_type, ".mp4", is_live=True)
            assert entry.live_path is not None
            entry.live_path.write_bytes(b"live")
            yield FileStarted(media_id, job.media_type, 1)
        elif job.media_type:
            media_id = new_media_id(job.job_id)
            entry = self._jobs.media.create(media_id, job.media_type, ".bin", is_live=False)
        if self.gate is not None:
            await self.gate()
        if job.media_type:
            entry.path.write_bytes(b"finished")
            entry.finish()
        yield Finished(
            request_id=job.request_id,
            job_id=job.job_id,
            mode=job.mode,
            media_id=media_id if job.media_type else "",
            media_type=job.media_type,
            num_bytes=8 if job.media_type else 0,
            num_frames=job.num_frames,
            fps=job.fps,
            height=job.height,
            width=job.width,
            seed=job.seed,
            frames_sha256="a" * 64,
            negative_origin="built-in",
            notes=tuple(job.notes),
            stage_seconds={"denoise": 1.0, "total": 2.0},
            actions=self.actions,
        )


@dataclass
class FakeReadiness:
    """Reports the readiness that the test has set."""

    missing: list[str] = field(default_factory=list)

    async def find_missing_stages(self) -> list[str]:
        return self.missing


async def no_metrics() -> tuple[str, str]:
    return "cosmos3_requests_total 1\n", "text/plain; version=0.0.4; charset=utf-8"


class Api:
    """A running API, its HTTP client, and the runners of its jobs.

    Everything runs in one event loop; every answer is checked against the OpenAPI document.

    Args:
        directory: for files.
        database: copied at the start, which is faster than migrating an empty one.
        layout: layout of the checkpoint.
        needs_keys, ..., http: configuration of the service.
    """

    def __init__(
        self,
        directory: Path,
        database: Path,
        layout: CheckpointLayout,
        *,
        needs_keys: bool = False,
        has_guardrails: bool = True,
        may_disable_guardrails: bool = False,
        max_followers: int = 8,
        fetch_file: FetchFile | None = None,
        http: Mapping[str, Any] | None = None,
        limits: JobsConfig = LIMITS,
    ) -> None:
        self.runner = asyncio.Runner()
        shutil.copy(database, directory / "jobs.sqlite")
        self.store = JobStore.open(f"sqlite:///{directory / 'jobs.sqlite'}")
        self.media = MediaStore(directory / "media", max_bytes=1 << 30, keep_s=1000.0)
        self.files = JobFiles(self.media.objects)
        jobs = JobService(self.store, self.files, self.media, max_followers)
        self.director = FakeDirector(layout, jobs, limits, may_skip_guardrails=may_disable_guardrails)
        self.readiness = FakeReadiness()
        self.service = Service(
            model=Model.of(layout, MODEL, is_sound_offered=True).model_copy(update={"created": 1_700_000_000}),
            http=HttpConfig(**(http or {})),
            rules=BodyRules(
                tuple(dict.fromkeys((MODEL, *layout.model_names))),
                tuple(CLASSES),
                has_guardrails=has_guardrails,
                may_disable_guardrails=may_disable_guardrails,
            ),
            jobs=jobs,
            director=self.director,
            streaming=self.director,
            find_missing_stages=self.readiness.find_missing_stages,
            metrics_text=no_metrics,
            auth=Authenticator(self.store.keys) if needs_keys else None,
            fetch_file=fetch_file,
        )
        self.app = build_api(lambda: self.service)
        self.documented = ApiDocument(make_document(self.app, self.service))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def in_time() -> Any:
            async with asyncio.timeout(DEADLINE_S):
                return await work

        return self.runner.run(in_time())

    async def asend(self, method: str, path: str, **options: Any) -> httpx2.Response:
        transport = httpx2.ASGITransport(self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://cosmos3") as client:
            answer = await client.request(method, path, **options)
        self.documented.check(answer)
        return answer

    def send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        response: httpx2.Response = self.run(self.asend(method, path, **options))
        return response

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self.send("POST", path, **options)

    def create(self, body: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """POST a body; return the created job's object."""
        answer = self.post("/v1/videos", json={"prompt": "a cat"} if body is None else body, **options)
        assert answer.status_code == 200, answer.text
        video: dict[str, Any] = answer.json()
        return video

    def expect_refusal(self, method: str, path: str, status: int, **options: Any) -> dict[str, Any]:
        """Return the error of a refusal."""
        answer = self.send(method, path, **options)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    # What runners do

    def claim(self, lane: Lane = Lane.VIDEO) -> Job:
        job = self.store.claim(ClaimRequest("runner", MODEL, lane, LIMITS))
        assert job is not None
        return job

    def step(self, job: Job, step: int, sigma: float = 0.5) -> None:
        data = {"step": step, "num_steps": job.num_steps, "sigma": sigma, "eta_s": 1.0, "step_s": 0.1, "pid": 7}
        self.store.record(
            make_lease(job), Progress(step=step, sigma=sigma, step_s=0.1, stage="denoising"), [("step", data)]
        )

    def begin_file(self, job: Job, *, is_live: bool = True) -> MediaEntry:
        media_id = new_media_id(job.job_id)
        entry = self.media.create(media_id, "video/mp4", ".mp4", is_live=is_live)
        self.store.record(make_lease(job), Progress(media_id=media_id), [("file", {"media_type": "video/mp4"})])
        return entry

    def complete(self, job: Job, data: bytes | None = b"finished", actions: Any = None) -> Job:
        if data is not None:
            entry = self.begin_file(job)
            entry.path.write_bytes(data)
            entry.finish()
        result = {
            "num_bytes": 0 if data is None else len(data),
            "num_frames": job.num_frames,
            "frames_sha256": "b" * 64,
            "stage_durations": {"denoise": 1.0, "total": 2.0},
            "inference_time_s": 2.0,
            "actions": actions,
        }
        return self.store.finish(make_lease(job), Outcome(JobState.COMPLETED, result), keep_media_s=100.0)

    def fail(self, job: Job) -> Job:
        outcome = Outcome(JobState.FAILED, error_code="stage_failed", error_message="it broke")
        return self.store.finish(make_lease(job), outcome, keep_media_s=100.0)

    def close(self) -> None:
        self.runner.close()
        self.store.close()


def make_scope(method: str, target: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> dict[str, Any]:
    """Make the ASGI scope of a request to the host ``cosmos3``; the path is used as it is."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "root_path": "",
        "query_string": query.encode("latin-1"),
        "headers": [(b"host", b"cosmos3"), *((name.lower(), value) for name, value in headers)],
        "client": ("127.0.0.1", 1),
        "server": ("cosmos3", 80),
    }


class Follower:
    """A GET of the application whose answer arrives in parts."""

    def __init__(self, api: Api, path: str, headers: Mapping[str, str] | None = None) -> None:
        self._api, self._path, self._headers = api, path, headers or {}
        self.status, self.headers, self.body = 0, httpx2.Headers(), b""
        self.is_whole = False
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> Follower:
        headers = tuple((name.encode(), value.encode()) for name, value in self._headers.items())
        scope = make_scope("GET", self._path, headers)
        self._task = asyncio.create_task(self._api.app(scope, self._receive, self._send))
        while not self.status:
            await self._next()
        return self

    async def until(self, text: bytes) -> bytes:
        """Return everything received, once it contains ``text``."""
        while text not in self.body:
            await self._next()
        return self.body

    async def to_its_end(self) -> bytes:
        assert self._task is not None
        await self._task
        return self.body

    async def leave(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _next(self) -> None:
        assert self._task is not None
        waiting = asyncio.ensure_future(self._came.wait())
        await asyncio.wait((waiting, self._task), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done() and not self._came.is_set():
            self._task.result()
            raise AssertionError(f"it has ended: {self.status} {self.body!r}")
        self._came.clear()

    async def _receive(self) -> Any:
        await asyncio.sleep(0)
        if not self._came.is_set() and not self.status:
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.sleep(DEADLINE_S)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = httpx2.Headers([(name.decode(), value.decode()) for name, value in message["headers"]])
        else:
            self.body += message.get("body", b"")
            self.is_whole = not message.get("more_body", False)
        self._came.set()
