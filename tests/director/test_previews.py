"""The Director gets the preview map from a decoder. Without Ray."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator

import pytest

from cluster.errors import GangFailed, PreviewFailed
from cosmos3_core.preview import PreviewMap, PreviewOrder
from deployments.director import resources
from deployments.director.resources import Previews
from deployments.messages import RequestContext
from deployments.stages.video_vae import CallLimits, VideoVAEDeployment
from tests.serve_fakes import Response
from tests.settling import run, settle

MAP = PreviewMap(((0.1, 0.2, 0.3),), (0.0, 0.0, 0.0))


class FakeVAE:
    """A handle of decoders that fail a given number of times and answer when released."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls: list[RequestContext] = []
        self.may_answer = asyncio.Event()
        self.preview_map = self

    def remote(self, context: RequestContext) -> Response:
        assert context.remaining_s("previews") > 60
        self.calls.append(context)
        return Response(self._answer())

    async def _answer(self) -> AsyncIterator[PreviewMap]:
        await self.may_answer.wait()
        if self.failures:
            raise self.failures.pop(0)
        yield MAP


def test_concurrent_requests_share_one_fetch_of_the_map() -> None:
    async def body() -> None:
        vae = FakeVAE()
        previews = Previews(vae)
        orders = [asyncio.create_task(previews.order(number, 2.0)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        orders[0].cancel()
        await asyncio.sleep(0)
        vae.may_answer.set()
        assert await orders[1] == PreviewOrder(2, 2.0, MAP)
        assert await orders[2] == PreviewOrder(3, 2.0, MAP)
        assert await previews.order(4, 5.0) == PreviewOrder(4, 5.0, MAP)
        assert len(vae.calls) == 1

    run(body())


def test_a_failed_fetch_is_reported_and_the_next_request_retries(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        vae = FakeVAE(RuntimeError("no memory\nmore words"))
        vae.may_answer.set()
        previews = Previews(vae)
        first = await asyncio.gather(*(previews.order(1, 1.0) for _ in range(2)), return_exceptions=True)
        assert [str(error) for error in first] == ["no previews: RuntimeError: no memory"] * 2
        assert caplog.text.count("previews cannot be made") == 1
        assert (await previews.order(1, 1.0)).preview_map == MAP
        assert len(vae.calls) == 2

    run(body())


def test_a_late_waiter_of_a_failure_does_not_discard_the_next_fetch() -> None:
    async def body() -> None:
        vae = FakeVAE(RuntimeError("no memory"))
        vae.may_answer.set()
        previews = Previews(vae)

        async def twice() -> PreviewOrder:
            with pytest.raises(PreviewFailed):
                await previews.order(1, 1.0)
            return await previews.order(1, 1.0)

        first, late = await asyncio.gather(twice(), previews.order(2, 1.0), return_exceptions=True)
        assert (type(first), type(late)) == (PreviewOrder, PreviewFailed)
        await previews.order(3, 1.0)
        assert len(vae.calls) == 2

    run(body())


def test_the_fetch_outlives_the_request_that_started_it() -> None:
    """Serve cancels the calls made in a request's context together with the request."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")

    class Looking(FakeVAE):
        def remote(self, context: RequestContext) -> Response:
            seen.append(request.get("none"))
            return super().remote(context)

    seen: list[str] = []

    async def body() -> None:
        request.set("the first one")
        vae = Looking()
        vae.may_answer.set()
        await Previews(vae).order(1, 1.0)
        assert seen == ["none"]

    run(body())


def test_a_ranks_refusal_keeps_its_message() -> None:
    async def body() -> None:
        vae = FakeVAE(PreviewFailed("OutOfMemory: of 1 GiB"), GangFailed("previews", "died in preview_map()", 0))
        vae.may_answer.set()
        previews = Previews(vae)
        with pytest.raises(PreviewFailed, match="^no previews: OutOfMemory: of 1 GiB$"):
            await previews.order(1, 1.0)
        with pytest.raises(PreviewFailed, match=r"^no previews: GangFailed: .*died in preview_map"):
            await previews.order(1, 1.0)

    run(body())


def test_the_decoders_leader_calls_rank_0_alone() -> None:
    class FakeCalls:
        async def call_rank_0(self, method: str, *, phase: str, timeout_s: float) -> PreviewMap:
            assert (method, phase, timeout_s) == ("preview_map", "previews", 7.0)
            return MAP

    async def body() -> None:
        leader = VideoVAEDeployment.__new__(VideoVAEDeployment)
        leader._calls, leader._limits = FakeCalls(), CallLimits(first_timeout_s=7.0, timeout_s=1.0)  # type: ignore[assignment]
        context = RequestContext.new(None, 60.0)
        assert [item async for item in leader.preview_map(context)] == [MAP]

    run(body())


def test_a_request_waits_a_bounded_time_while_the_fetch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_WAIT_S", 0.02)

    async def body() -> None:
        vae = FakeVAE()
        previews = Previews(vae)
        for _ in range(2):
            with pytest.raises(PreviewFailed, match="goes on making it"):
                await previews.order(1, 1.0)
        vae.may_answer.set()
        await settle()
        assert (await previews.order(1, 1.0)).preview_map == MAP
        assert len(vae.calls) == 1

    run(body())
