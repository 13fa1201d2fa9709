"""A clip's mailbox: bounded, ordered, and every wait ends. Without Ray: it is a plain async class."""

from __future__ import annotations

import asyncio

import pytest

from cluster.clip_stream import ClipStreams
from cluster.errors import OverloadedError, StreamClosed
from tests.settling import run, settle


def test_chunks_come_in_order_and_then_the_end() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=2)
        for item in ("x", "y"):
            assert await clips.acquire("a", "p", 1)
            await clips.post("a", "p", [item])
        await clips.complete("a")
        assert [await clips.take("a", 1) for _ in range(3)] == [["x"], ["y"], []]

    run(body())


def test_a_producer_waits_for_its_credit() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=2)
        assert await clips.acquire("a", "p", 1)
        assert await clips.acquire("a", "p", 1)
        with pytest.raises(TimeoutError):
            await clips.acquire("a", "p", 0.05)
        await clips.release_chunk("a")
        assert await clips.acquire("a", "p", 1)

    run(body())


def test_a_consumer_waits_for_a_chunk() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=1)
        with pytest.raises(TimeoutError):
            await clips.take("a", 0.05)
        taking = asyncio.create_task(clips.take("a", 5))
        await settle()
        await clips.post("a", "p", ["x"])
        assert await taking == ["x"]

    run(body())


def test_closing_ends_both_sides() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=1)
        assert await clips.acquire("a", "p", 1)
        producing = asyncio.create_task(clips.acquire("a", "p", 5))
        consuming = asyncio.create_task(clips.take("a", 5))
        await settle()
        await clips.close("a", "because")
        assert await producing is False
        with pytest.raises(StreamClosed, match="because"):
            await consuming
        # Later calls end as well.
        assert await clips.acquire("a", "p", 1) is False
        with pytest.raises(StreamClosed, match="not open"):
            await clips.take("a", 1)
        await clips.post("a", "p", ["late"])
        await clips.release_chunk("a")
        await clips.complete("a")
        await clips.close("a", "twice")
        assert await clips.num_open() == 0

    run(body())


def test_closing_ends_every_producer() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=1)
        assert await clips.acquire("a", "p", 1)
        waiting = [asyncio.create_task(clips.acquire("a", "p", 10)) for _ in range(3)]
        await settle()
        await clips.close("a", "because")
        async with asyncio.timeout(5):
            assert await asyncio.gather(*waiting) == [False] * 3

    run(body())


def test_clips_do_not_mix_and_their_number_is_bounded() -> None:
    async def body() -> None:
        clips = ClipStreams(2)
        await clips.open("a", window=1)
        await clips.open("b", window=1)
        with pytest.raises(OverloadedError):
            await clips.open("c", window=1)
        await clips.post("b", "p", ["b0"])
        await clips.post("a", "p", ["a0"])
        assert (await clips.take("a", 1), await clips.take("b", 1)) == (["a0"], ["b0"])
        await clips.close("a", "done")
        await clips.open("c", window=1)

    run(body())


def test_a_dead_producers_unused_credits_are_returned() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=3)
        for _ in range(3):
            assert await clips.acquire("a", "first", 1)
        await clips.post("a", "first", ["x"])
        late = asyncio.create_task(clips.acquire("a", "first", 5))
        await settle()
        await clips.forget_producer("a", "first")
        assert await late is False, "it would have made a chunk that nobody posts"
        # Two of three: the posted chunk is not consumed yet.
        assert await clips.acquire("a", "second", 1)
        assert await clips.acquire("a", "second", 1)
        with pytest.raises(TimeoutError):
            await clips.acquire("a", "second", 0.05)
        assert await clips.take("a", 1) == ["x"]
        await clips.release_chunk("a")
        assert await clips.acquire("a", "second", 1)

    run(body())


def test_a_credit_without_a_chunk_is_returned_once() -> None:
    async def body() -> None:
        clips = ClipStreams(1)
        await clips.open("a", window=1)
        assert await clips.acquire("a", "p", 1)
        for _ in range(2):
            await clips.return_credit("a", "p")
        assert await clips.acquire("a", "p", 1)
        with pytest.raises(TimeoutError):
            await clips.acquire("a", "p", 0.05)

    run(body())
