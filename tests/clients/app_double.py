"""A scripted app in this process, over HTTP and over a Director's handle, with faults that no real app shows on cue.

A video's story is a list of events. Connections break after a given event or byte, answers come late or are errors, and
a story waits until the test lets it continue. :mod:`tests.app.test_clients` runs the same clients against a real app.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx2
from ray.exceptions import RayActorError

from cluster.errors import DeadlineExceeded
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.api.call import error_response
from deployments.errors import ApiError, JobCancelled
from deployments.jobs.events import event_of_json
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Video
from tests.serve_fakes import Method, Response

FINAL = ("completed", "failed", "cancelled")
VIDEO: dict[str, Any] = {
    **dict.fromkeys(Video.model_fields),
    "object": "video",
    "status": "queued",
    "progress": 0,
    "model": "tiny",
    "mode": "text_to_video",
    "size": "96x64",
    "seconds": "0.375",
    "duration_s": 0.375,
    "quality": "high",
    "fps": 24.0,
    "num_frames": 9,
    "seed": 7,
    "step": 0,
    "num_steps": 2,
    "stage": "queued",
    "attempts": 0,
    "metrics": {},
    "stage_durations": {},
    "notes": ["a note"],
    "warnings": [],
}
"""A queued video."""
WAIT = ("wait", {})
"""In a story: the rest waits until :attr:`App.may_go_on` is set; it never happens if the video is stopped first."""

STORY: list[tuple[str, dict[str, Any]]] = [
    ("queued", {"position": 1, "eta_s": None}),
    ("step", {"step": 1, "num_steps": 2, "sigma": 0.5, "step_s": 0.25, "eta_s": None, "pid": 7}),
    ("preview", {"step": 1, "sigma": 0.5, "media_type": "image/webp", "b64_json": "d2VicA=="}),
    ("step", {"step": 2, "num_steps": 2, "sigma": 0.0, "step_s": 0.25, "eta_s": None, "pid": 7}),
    ("file", {"media_type": "video/mp4"}),
    ("retried", {"stage": "decode", "attempt": 1, "from_step": 0}),
    ("decoding", {"chunk": 0, "num_frames": 9}),
    ("completed", {}),
]


def make(kind: type, **values: Any) -> Any:
    """Return a message of which only some fields matter."""
    return kind(**{field.name: values.get(field.name) for field in dataclasses.fields(kind)})


class App:
    """The app, its videos and the faults that a test has set.

    Attributes:
        story: events of the videos submitted from now on.
        next_errors: errors that the next calls raise, one each.
        break_after: number of events after which the next event connections break; None: never.
        end_after: number of events after which they end cleanly.
        api_key: required of HTTP callers; None: none.
        file: content of finished videos.
        break_file_after: number of bytes after which the next file connection breaks; None: never.
        submitted: requests and their options.
        followed: event number after which each event connection started.
        stopped: ids of videos that were cancelled or lost their caller.
        calls: number of calls.
        delay_s: delay of HTTP answers.
        num_closed: number of event connections that ended or were closed.
        num_requests: number of HTTP requests.
    """

    def __init__(self) -> None:
        self.story = list(STORY)
        self.next_errors: list[Exception] = []
        self.break_after: list[int | None] = []
        self.end_after: list[int | None] = []
        self.api_key: str | None = None
        self.file: bytes | None = b"0123456789" * 20_000
        self.break_file_after: int | None = None
        self.media_type: str | None = "video/mp4"
        self.submitted: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.followed: list[int] = []
        self.stopped: list[str] = []
        self.calls = 0
        self.delay_s = 0.0
        self.num_closed = self.num_requests = 0
        self._answering: set[asyncio.Task[httpx2.Response]] = set()
        self.may_go_on = False
        self.videos: dict[str, dict[str, Any]] = {}
        self.stories: dict[str, list[tuple[str, dict[str, Any]]]] = {}

    # Over HTTP and handles

    def begin(self, prompt: str, options: dict[str, Any], remixed_from: str | None = None) -> str:
        """Submit a video; return its id."""
        self.submitted.append(({"prompt": prompt}, options))
        video_id = f"video_gen_{len(self.submitted):032x}"
        self.stories[video_id] = list(self.story)
        self.videos[video_id] = {
            **VIDEO,
            "id": video_id,
            "prompt": prompt,
            "created_at": 1000 + len(self.submitted),
            "remixed_from_video_id": remixed_from,
            "service_class": options.get("service_class") or "standard",
            "something_new": {"of": "a later version"},
        }
        return video_id

    def check(self) -> None:
        """Count a call; raise the next error of ``next_errors``."""
        self.calls += 1
        if self.next_errors:
            raise self.next_errors.pop(0)

    def end(self, video_id: str, kind: str, data: dict[str, Any]) -> None:
        video = self.videos[video_id]
        if video["status"] in ("completed", "failed"):
            return
        if kind == "completed":
            shown = {"media_type": self.media_type, "frames_sha256": "f00d", "stage_durations": {"total": 1.5}}
            video |= {"status": "completed", "progress": 100, **shown}
        else:
            error = data or {"code": "cancelled", "message": "cancelled by its owner"}
            video |= {"status": "failed", "error": error}

    def cancel(self, video_id: str) -> dict[str, Any] | None:
        if video_id in self.videos:
            self.stopped.append(video_id)
            self.end(video_id, "cancelled", {})
        return self.videos.get(video_id)

    def page(self, after: str | None, limit: int, order: str) -> tuple[list[dict[str, Any]], bool]:
        videos = list(self.videos.values())
        if order == "desc":
            videos.reverse()
        ids = [video["id"] for video in videos]
        if after is not None and after not in ids:
            raise RequestError("after", after, "the id of a video that is there")
        start = 0 if after is None else ids.index(after) + 1
        return videos[start : start + limit], start + limit < len(videos)

    def read(self, video_id: str, variant: str) -> bytes:
        status = self.find(video_id)["status"]
        if status == "failed":
            raise ApiError(410, "media_failed", "there is no file: the job has failed or was cancelled")
        if status != "completed":
            raise ApiError(409, "media_not_ready", "the file is not ready yet")
        if self.file is None:
            raise ApiError(404, "no_such_variant", "this job has made actions alone")
        return self.file if variant == "video" else variant.encode()

    async def iterate_events(self, video_id: str, after: int) -> AsyncIterator[tuple[int, str, dict[str, Any]]]:
        """Yield a video's events after number ``after``."""
        seq = 0
        for kind, data in self.stories[video_id]:
            if kind == "wait":
                while not self.may_go_on and video_id not in self.stopped:
                    await asyncio.sleep(0.002)
                continue
            if video_id in self.stopped:
                self.end(video_id, "cancelled", {})
                yield seq + 1, "cancelled", self.videos[video_id]
                return
            if kind == "queued":
                yield 0, kind, data
                continue
            seq += 1
            if kind in FINAL:
                self.end(video_id, kind, data)
                data = self.videos[video_id]
            if seq > after:
                yield seq, kind, data

    async def iterate_breaking(self, video_id: str, after: int) -> AsyncIterator[tuple[int, str, dict[str, Any]]]:
        """Yield a video's events over a connection that may break."""
        self.followed.append(after)
        break_after = self.break_after.pop(0) if self.break_after else None
        end_after = self.end_after.pop(0) if self.end_after else None
        number = 0
        async for event in self.iterate_events(video_id, after):
            if number == break_after:
                raise RayActorError
            if number == end_after:
                return
            number += 1
            yield event

    # Over HTTP

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.num_requests += 1
        # A complete request is executed even if its caller disconnects.
        answering = asyncio.create_task(self._answer(request))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        try:
            return await asyncio.shield(answering)
        except Exception as error:  # noqa: BLE001 - as the API has it
            answer = error_response(error)
            return httpx2.Response(
                answer.status_code, headers=dict(answer.headers), stream=Body(iterate_parts(answer.body))
            )

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(self.delay_s)
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong")
        self.check()
        parts = request.url.path.removeprefix("/v1/").split("/")
        match [request.method, *parts]:
            case ["POST", "videos"]:
                body = json.loads(request.content)
                return self._json(self.videos[self.begin(body["prompt"], self._read_options(request, body))])
            case ["POST", "videos", video_id, "remix"]:
                body = json.loads(request.content)
                self.find(video_id)
                return self._json(self.videos[self.begin(body["prompt"], self._read_options(request, body), video_id)])
            case ["GET", "videos"]:
                query = request.url.params
                videos, has_more = self.page(query.get("after"), int(query["limit"]), query["order"])
                return self._json(page_of(videos, has_more))
            case ["GET", "videos", video_id]:
                return self._json(self.find(video_id))
            case ["POST", "videos", video_id, "cancel"]:
                self.find(video_id)
                return self._json(self.cancel(video_id) or {})
            case ["DELETE", "videos", video_id]:
                self.find(video_id)
                self.cancel(video_id)
                del self.videos[video_id]
                return self._json({"id": video_id, "object": "video.deleted", "deleted": True})
            case ["GET", "videos", video_id, "events"]:
                self.find(video_id)
                after = int(request.headers.get("last-event-id", 0))
                headers = {"content-type": "text/event-stream; charset=utf-8"}
                return httpx2.Response(200, headers=headers, stream=Body(self._sse(video_id, after)))
            case ["GET", "videos", video_id, "content"]:
                data = self.read(video_id, request.url.params.get("variant", "video"))
                headers = {"content-length": str(len(data))}
                return httpx2.Response(200, headers=headers, stream=Body(self._file(data)))
            case ["GET", "models"]:
                return self._json({"object": "list", "data": MODELS})
            case _:
                raise ApiError(404, "no_such_route", "Not Found")

    def _read_options(self, request: httpx2.Request, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "request_id": request.headers.get("x-request-id"),
            "idempotency_key": request.headers.get("idempotency-key"),
            "service_class": body.get("service_class"),
            "previews": body.get("previews", 0),
        }

    def _json(self, value: dict[str, Any]) -> httpx2.Response:
        return httpx2.Response(200, stream=Body(iterate_parts(json.dumps(value).encode())))

    def find(self, video_id: str) -> dict[str, Any]:
        if video_id not in self.videos:
            raise ApiError(404, "not_found", f"there is no video {video_id!r}")
        return self.videos[video_id]

    async def _file(self, data: bytes) -> AsyncIterator[bytes]:
        end, self.break_file_after = self.break_file_after, None
        async for part in iterate_parts(data[:end]):
            yield part
        if end is not None:
            raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")

    async def _sse(self, video_id: str, after: int) -> AsyncIterator[bytes]:
        yield b": hello\n\n"
        try:
            async for seq, kind, data in self.iterate_breaking(video_id, after):
                number = f"id: {seq}\n" if seq else ""
                text = f"{number}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
                for start in range(0, len(text), 50):  # parts end anywhere
                    yield text[start : start + 50]
        except RayActorError:
            yield b"id: 999\nevent: step\nda"
            raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body") from None
        finally:
            self.num_closed += 1

    # Over handles

    @property
    def director(self) -> Director:
        """The Director's handle."""
        return Director(self)


MODELS = [
    {
        "id": "tiny",
        "object": "model",
        "created": 5,
        "owned_by": "nvidia",
        "family": "cosmos3",
        "variant": "nano",
        "modes": ["a", "b"],
    }
]


class Body(httpx2.AsyncByteStream):
    """The body of an answer, part by part."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts:
            yield part

    async def aclose(self) -> None:
        await self._parts.aclose()  # type: ignore[attr-defined]


def page_of(videos: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [video["id"] for video in videos] or [None]
    return {"object": "list", "data": videos, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}


async def iterate_parts(data: bytes | memoryview[int]) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 50_000):
        yield bytes(data[start : start + 50_000])


class Director:
    """The handle of a Director."""

    def __init__(self, app: App) -> None:
        self._app = app

    def options(self, *, stream: bool) -> Director:
        assert stream
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("stream", "events"):
            return SimpleNamespace(remote=getattr(self, f"_{name}"))

        async def call(*arguments: Any) -> Any:
            self._app.check()
            return getattr(self, f"_{name}")(*arguments)

        return Method(call)

    def _submit(self, request: GenerationRequest, options: SubmitOptions) -> Any:
        return SimpleNamespace(job_id=self._app.begin(request.prompt, dataclasses.asdict(options)))

    def _remix(self, job_id: str, prompt: str, options: SubmitOptions) -> Any:
        self._app.find(job_id)
        return SimpleNamespace(job_id=self._app.begin(prompt, dataclasses.asdict(options), job_id))

    def _job(self, job_id: str, owner: str) -> dict[str, Any]:
        assert owner == ""
        return self._app.find(job_id)

    def _jobs(self, owner: str, after: str | None, limit: int, order: str) -> Any:
        videos, has_more = self._app.page(after, limit, order)
        return page_of(videos, has_more)

    def _cancel(self, job_id: str, owner: str) -> Any:
        self._app.find(job_id)
        return self._app.cancel(job_id)

    def _delete(self, job_id: str, owner: str) -> Any:
        self._app.find(job_id)
        self._app.cancel(job_id)
        del self._app.videos[job_id]

    def _read(self, job_id: str, start: int, num_bytes: int, owner: str, variant: str = "video") -> bytes:
        if self._app.break_file_after is not None and start >= self._app.break_file_after:
            self._app.break_file_after = None
            raise RayActorError
        return self._app.read(job_id, variant)[start : start + num_bytes]

    def _models(self) -> list[dict[str, Any]]:
        return MODELS

    def _events(self, job_id: str, after: int, timeout_s: float, owner: str) -> Response:
        async def items() -> AsyncIterator[Any]:
            self._app.check()
            self._app.find(job_id)
            async for seq, kind, data in self._app.iterate_breaking(job_id, after):
                yield SimpleNamespace(seq=seq, kind=kind, data=data)

        def on_cancel() -> None:
            self._app.num_closed += 1

        return Response(items(), on_cancel)

    def _stream(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float) -> Response:
        app = self._app
        begun: list[str] = []

        async def items() -> AsyncIterator[Any]:
            app.check()
            job_id = app.begin(request.prompt, dataclasses.asdict(options))
            begun.append(job_id)
            yield make(messages.Accepted, job_id=job_id, notes=())
            yield make(messages.Tokenized)
            async for _, kind, data in app.iterate_events(job_id, 0):
                yield _message(kind, data, job_id)

        def on_cancel() -> None:
            # Cancelling an ended stream does nothing.
            if begun and app.videos[begun[0]]["status"] not in ("completed", "failed"):
                app.cancel(begun[0])

        return Response(items(), on_cancel)


def _message(kind: str, data: dict[str, Any], job_id: str) -> Any:
    """Return or raise what a Director sends for an event."""
    match kind:
        case "completed":
            return make(messages.Finished, job_id=job_id)
        case "cancelled":
            raise JobCancelled(job_id, data["error"]["message"])
        case "failed":
            raise FAILURES[data["error"]["code"]]
        case _:
            return event_of_json(kind, data)


FAILURES: dict[str, Exception] = {"deadline_exceeded": DeadlineExceeded("denoise", 60.0)}
"""Code of a failed job -> the error that a Director raises."""
