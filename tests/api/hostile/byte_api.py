"""An API whose Director really accepts, called with raw bytes: no HTTP client normalises the request."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import PIL.Image

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.media.child_reader import read_clip_in_child
from cosmos3_core.media.kinds import STILL, kind_of
from deployments.config import JobsConfig
from deployments.jobs.job import Job
from tests.api.fake_service import CLASSES, Api, make_scope
from tests.api.hostile.safe_answers import ForbiddenWords

LIMITS = JobsConfig(max_queued=100_000, max_queued_per_key=100_000, classes=CLASSES, lease_s=1e6)
_MAX_LEFT = 200
# How long to wait for more of a body without a length, such as events or a growing file.
_PATIENCE_S = 0.1


@dataclass(frozen=True)
class Sent:
    """One HTTP request as it goes over the wire, or as a server hands it on.

    Attributes:
        method, target: the request line's; the target is percent-encoded, with its query.
        headers: names and values, unchanged.
        body: its pieces, in the order of their arrival.
    """

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: tuple[bytes, ...] = ()

    @classmethod
    def post(cls, target: str, content_type: str | bytes, body: bytes, *headers: tuple[bytes, bytes]) -> Sent:
        """Make a POST with the correct Content-Length."""
        kind = content_type if isinstance(content_type, bytes) else content_type.encode("latin-1")
        length = (b"content-length", str(len(body)).encode())
        return cls("POST", target, ((b"content-type", kind), length, *headers), (body,))

    @property
    def all_bytes(self) -> bytes:
        """Everything that was sent; an answer may repeat it."""
        targets = [self.target.encode(), urllib.parse.unquote_to_bytes(self.target)]
        return b"\n".join([*targets, *(name + b": " + value for name, value in self.headers), *self.body])


class ByteApi(Api):
    """An :class:`Api` called in bytes; each answer is checked for leaks, delays and unreleased room.

    Args:
        directory, database, layout, options: see :class:`Api`.
        canary: content of a file that no answer may contain.

    Attributes:
        forbidden: words that no answer may contain.
        kept_ids: ids of jobs that :meth:`delete_jobs` leaves.
    """

    def __init__(
        self, directory: Path, database: Path, layout: CheckpointLayout, *, canary: bytes = b"", **options: Any
    ) -> None:
        super().__init__(directory, database, layout, limits=LIMITS, **options)
        self.forbidden = ForbiddenWords.of(directory, layout.directory, canary=canary)
        self.kept_ids: set[str] = set()

    def exchange(self, sent: Sent) -> httpx2.Response:
        """Return the answer, checked to be safe, in time, and without unreleased room."""
        if len(self.director.submitted) > _MAX_LEFT:
            self.delete_jobs()
        answer: httpx2.Response = self.run(call_app(self.app, sent))
        self.forbidden.check(answer, sent.all_bytes)
        assert self.service.body_memory.taken_bytes == 0, sent
        return answer

    def check_accepted(self) -> None:
        """Check that the media of the last accepted request can be read."""
        request, _ = self.director.submitted[-1]
        for data in (request.image, request.video):
            if data is None:
                continue
            assert isinstance(data, bytes)
            if kind_of(data).category == STILL:
                with PIL.Image.open(io.BytesIO(data)) as picture:
                    assert min(picture.size) > 0
            else:
                assert len(read_clip_in_child("video", data, num_frames=1, keep="first")) == 1

    def delete_jobs(self) -> None:
        """Delete all jobs that are not kept, as if they had expired."""
        while jobs := [job for job in self._page() if job.job_id not in self.kept_ids]:
            for job in jobs:
                self.store.delete(job.job_id)
                self.files.remove(job.job_id)
        self.director.submitted.clear()
        self.director.stream.responses.clear()

    def _page(self) -> tuple[Job, ...]:
        return self.store.list("", after=None, limit=100, is_ascending=False).jobs


async def call_app(app: Any, sent: Sent) -> httpx2.Response:
    """Call an application; hang up when its answer stops."""
    scope = make_scope(sent.method, sent.target, sent.headers)
    scope["path"] = urllib.parse.unquote(scope["path"])
    status, headers, body = 0, [], bytearray()
    pieces, came, gone = list(sent.body or (b"",)), asyncio.Event(), asyncio.Event()

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], message["headers"]
        else:
            body.extend(message.get("body", b""))
        came.set()

    begun_s = time.monotonic()
    answering = asyncio.ensure_future(app(scope, receive, send))
    while not answering.done():
        came.clear()
        coming = asyncio.ensure_future(came.wait())
        await asyncio.wait((answering, coming), timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        is_silent = not coming.done()
        coming.cancel()
        is_endless = status and not any(name == b"content-length" for name, _ in headers)
        if is_endless and is_silent:
            answering.cancel()  # as Serve does it with a call whose client has hung up
            gone.set()
            break
    with contextlib.suppress(asyncio.CancelledError):
        await answering
    assert status, "there was no answer"
    request = httpx2.Request(sent.method, f"http://cosmos3{sent.target}", headers=list(sent.headers))
    answer = httpx2.Response(status, headers=headers, content=bytes(body), request=request)
    answer.elapsed = datetime.timedelta(seconds=time.monotonic() - begun_s)
    return answer
