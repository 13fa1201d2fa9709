"""Producers of a clip's stream make a chunk per credit, and two can share one stream."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.clip_stream import ClipStreams
from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded
from deployments.messages import RequestContext
from deployments.stages.streams import produce_on_credit
from tests.serve_fakes import Handle
from tests.settling import run, settle


class Source:
    """Makes a given number of chunks."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks, self.made = num_chunks, 0

    async def __call__(self) -> TensorEnvelope | None:
        if self.made == self.num_chunks:
            return None
        self.made += 1
        return TensorEnvelope.of_array(np.full(3, self.made, np.uint8))


def test_a_chunk_is_made_when_there_is_a_credit_for_it() -> None:
    async def body() -> None:
        clips, source = ClipStreams(1), Source(5)
        await clips.open("a", window=2)
        made = produce_on_credit(RequestContext.new("r", 20), Handle(clips), "a", "p", source)
        assert (await anext(made))[0] == 0
        await settle()
        assert source.made == 2, "the second is made while the first is on its way"
        assert (await anext(made))[0] == 1
        waiting = asyncio.create_task(anext(made))
        await settle()
        assert source.made == 2, "the third waits for its credit"
        await clips.post("a", "p", ["chunk 0"])
        await clips.release_chunk("a")
        assert (await waiting)[0] == 2
        await clips.close("a", "enough")
        assert [index async for index, _ in made] == []
        assert source.made == 3

    run(body())


def test_leaving_stops_the_producer() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=2)
        was_stopped = asyncio.Event()

        async def make() -> int:
            if source.made:
                try:
                    await asyncio.sleep(100)
                finally:
                    was_stopped.set()
            source.made += 1
            return source.made

        source = Source(0)
        made = produce_on_credit(RequestContext.new("r", 20), Handle(clips), "a", "p", make)
        assert await anext(made) == (0, 1)
        await settle()
        async with asyncio.timeout(10):  # stopped before its end and the request's
            await made.aclose()
        assert was_stopped.is_set()

    run(body())


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("late", [0, 1])
def test_two_producers_share_the_credits_whoever_ends_first(window: int, late: int) -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=window)
        taken = []

        async def produce(number: int, num_chunks: int) -> None:
            await asyncio.sleep(0.05 * (number == late))
            context = RequestContext.new("r", 5)
            async for index, _ in produce_on_credit(context, Handle(clips), "a", str(number), Source(num_chunks)):
                taken.append((number, index))
                await clips.post("a", str(number), ["chunk"])
                await clips.release_chunk("a")  # the encoder's mailbox

        await asyncio.gather(produce(0, 4), produce(1, 1))
        assert sorted(taken) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]

    run(body())


def test_waiting_ends_with_the_deadline() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=1)
        assert await clips.acquire("a", "other", 1)
        with pytest.raises(DeadlineExceeded):
            await anext(produce_on_credit(RequestContext.new("r", 0.1), Handle(clips), "a", "p", Source(1)))

    run(body())
