"""The transport over the handle of the Director, from any process of the Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from cluster.errors import DeadlineExceeded, OutOfMemory, OverloadedError, ShuttingDown, StageFailed
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.api_model import ModelList
from deployments.clients.errors import AnswerError, UnreachableError, make_error, read_retry_after
from deployments.clients.transport import VIDEO, AttachedVideo, Deadline, read_answer, read_event
from deployments.errors import ApiError, ContentBlocked, IdempotencyConflict, JobCancelled
from deployments.failures import explain_error, summarize_error
from deployments.jobs.events import VideoEvent, event_as_json
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Video, VideoPage
from deployments.messages import Accepted, RequestContext
from deployments.stages.streams import RefStream

_PART_BYTES = 1 << 20
# The Director itself enforces the deadline and reports it; this bounds the wait for a Director that is gone.
_SLACK_S = 30.0
# Jobs over handles have no owner: API keys are for HTTP.
_OWNER = ""
# Errors that reach the caller as the app raised them.
_SHARED = (
    *(RequestError, OverloadedError, ShuttingDown, DeadlineExceeded, StageFailed, OutOfMemory),
    *(ContentBlocked, JobCancelled, IdempotencyConflict),
)


class HandleTransport:
    """A :class:`~deployments.clients.transport.Transport` over Serve handles; ``timeout_s`` is for one call."""

    def __init__(self, director: Any, timeout_s: float) -> None:
        self._director = director
        self._streaming = director.options(stream=True)
        self._timeout_s = timeout_s

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> Video:
        packed = await asyncio.to_thread(request.packed)
        job = await self._call(self._director.submit, packed, options)
        return await self.get_video(job.job_id)

    async def start_attached(
        self, request: GenerationRequest, options: SubmitOptions, timeout_s: float
    ) -> AttachedVideo:
        # A streaming call, which the Director stops when the caller leaves.
        packed = await asyncio.to_thread(request.packed)
        response = self._streaming.stream.remote(packed, options, timeout_s)
        items = self._iterate(response, timeout_s)
        try:
            accepted = await anext(items)
        except BaseException:
            response.cancel()
            raise
        assert isinstance(accepted, Accepted), "the first event of a Director"

        async def stop() -> None:
            response.cancel()

        return AttachedVideo(accepted.job_id, self._read_events(items, accepted.job_id), stop)

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> Video:
        job = await self._call(self._director.remix, video_id, prompt, options)
        return await self.get_video(job.job_id)

    async def get_video(self, video_id: str) -> Video:
        return read_answer(Video, await self._call(self._director.job, video_id, _OWNER))

    async def list_videos(self, after: str | None, limit: int, order: str) -> VideoPage:
        return read_answer(VideoPage, await self._call(self._director.jobs, _OWNER, after, limit, order))

    async def cancel(self, video_id: str) -> Video:
        return read_answer(Video, await self._call(self._director.cancel, video_id, _OWNER))

    async def delete(self, video_id: str) -> None:
        await self._call(self._director.delete, video_id, _OWNER)

    async def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        response = self._streaming.events.remote(video_id, after, timeout_s, _OWNER)
        try:
            async with aclosing(self._iterate(response, timeout_s)) as items:
                async for event in items:
                    yield read_event(event.kind, event.data, event.seq or None)
        except StageFailed as error:
            raise UnreachableError(f"the events of {video_id} broke off: {error.reason}") from None

    async def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        # One call per part: any replica of the Director can answer each.
        deadline, start = Deadline(timeout_s), 0
        which = () if variant == VIDEO else (variant,)
        while True:
            try:
                part: bytes = await deadline.wait(
                    self._call(self._director.read, video_id, start, _PART_BYTES, _OWNER, *which)
                )
            except TimeoutError:
                raise UnreachableError(f"the file of {video_id} did not come whole within {timeout_s:g} s") from None
            except StageFailed as error:
                raise UnreachableError(f"the file of {video_id} broke off: {error.reason}") from None
            if not part:
                return
            yield part
            start += len(part)

    async def list_models(self) -> ModelList:
        return read_answer(ModelList, {"object": "list", "data": await self._call(self._director.models)})

    async def aclose(self) -> None:
        """Do nothing: handles hold no connection."""

    async def _read_events(self, items: AsyncGenerator[Any, None], video_id: str) -> AsyncGenerator[VideoEvent, None]:
        async with aclosing(items):
            async for event in items:
                if event.kind:
                    yield read_event(event.kind, event_as_json(event))
        yield read_event("completed", await self._call(self._director.job, video_id, _OWNER))

    async def _iterate(self, response: Any, timeout_s: float) -> AsyncGenerator[Any, None]:
        """Yield the items of a streaming call; closing the generator stops the call."""
        stream = RefStream(response, RequestContext.new(None, timeout_s + _SLACK_S), "director")
        try:
            while (item := await stream.next_value()) is not None:
                yield item
        except Exception as error:  # noqa: BLE001 - translated by what it wraps
            raise _translate(error) from None
        finally:
            stream.cancel()

    async def _call(self, method: Any, *arguments: Any) -> Any:
        response = method.remote(*arguments)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except TimeoutError:
            raise UnreachableError(f"the Director gave no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # noqa: BLE001 - translated by what it wraps
            raise _translate(error) from None
        finally:
            response.cancel()  # does nothing once it has ended


def _translate(raised: BaseException) -> BaseException:
    """Return the error that the HTTP transport would raise; errors in ``_SHARED`` keep more than HTTP carries."""
    error, status, code, message, *_ = explain_error(raised)
    if isinstance(error, _SHARED):
        return error
    if status == 500:
        return AnswerError(status, summarize_error(error), code)
    retry_after = error.headers.get("retry-after") if isinstance(error, ApiError) else None
    return make_error(status, message, code, read_retry_after(retry_after))
