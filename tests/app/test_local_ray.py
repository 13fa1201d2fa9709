"""The in-process stand-in for Ray behaves as the product relies on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed
from tests.app.local_ray import Deployment, Handle, Loop, Ref


class Stage:
    """Two methods that answer, two that stream."""

    def __init__(self) -> None:
        self.num_left = 0
        self.may_end = asyncio.Event()

    async def change(self, values: list[int]) -> list[int]:
        values.append(1)
        return values

    async def wait(self) -> None:
        await self.may_end.wait()

    async def chunks(self, first: TensorEnvelope) -> AsyncIterator[TensorEnvelope]:
        yield first
        raise GangFailed("step", "it died", 2)

    async def forever(self) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            self.num_left += 1


@pytest.fixture
def own_loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def handle(own_loop: Loop, stage: Stage) -> Handle:
    return Handle(Deployment(own_loop, [stage], max_ongoing=1, max_queued=1))


async def every_ref(response: Any) -> list[Ref]:
    return [ref async for ref in await response._to_object_ref_gen()]


def test_values_are_copied_between_callers(handle: Handle) -> None:
    async def ask() -> None:
        mine = [0]
        assert await handle.change.remote(mine) == [0, 1]
        assert mine == [0]

    asyncio.run(ask())


def test_an_unpicklable_value_is_refused(handle: Handle) -> None:
    with pytest.raises((AttributeError, TypeError)):
        handle.change.remote([lambda: None])


def test_a_stream_gives_references_and_its_error_in_the_place_of_an_item(handle: Handle) -> None:
    async def follow() -> None:
        given = Ref.of(TensorEnvelope.of_array(np.ones(4, np.float32)))
        chunk, failure = await every_ref(handle.options(stream=True).chunks.remote(given))
        array = (await chunk).array()
        assert array.tolist() == [1.0] * 4
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2.0
        for _ in range(2):
            with pytest.raises(GangFailed, match="rank 2: it died"):
                await failure

    asyncio.run(follow())


def test_cancelling_a_stream_stops_its_producer(handle: Handle, stage: Stage) -> None:
    async def leave() -> None:
        response = handle.options(stream=True).forever.remote()
        assert await anext(response) == 1
        response.cancel()
        async with asyncio.timeout(60):
            while not stage.num_left:
                await asyncio.sleep(0.01)

    asyncio.run(leave())


def test_a_full_queue_refuses_calls_and_a_free_place_is_taken(handle: Handle, stage: Stage, own_loop: Loop) -> None:
    async def ask() -> None:
        served = [handle.wait.remote() for _ in range(2)]
        with pytest.raises(BackPressureError):
            await handle.wait.remote()
        own_loop.run(let_go(), 60)
        for response in served:
            await response

    async def let_go() -> None:
        stage.may_end.set()

    asyncio.run(ask())
