"""A client's own event loop: who waits for it, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time

import pytest

from cosmos3_core.errors import ClosedError
from cosmos3_core.request import GenerationRequest
from deployments.client import Cosmos3Client
from deployments.clients.loop_thread import LoopThread
from tests.clients.app_double import STORY, WAIT, App
from tests.clients.conftest import connected

DEADLINE_S = 30.0


def test_what_is_run_has_its_result_or_its_error() -> None:
    thread = LoopThread()

    async def value() -> int:
        await asyncio.sleep(0)
        return 3

    async def error() -> int:
        raise ZeroDivisionError

    assert thread.run(value()) == 3
    with pytest.raises(ZeroDivisionError):
        thread.run(error())

    async def inside() -> int:
        return thread.run(value())  # would wait for itself

    with pytest.raises(ClosedError):
        thread.run(inside())
    thread.close()
    thread.close()
    with pytest.raises(ClosedError):
        thread.run(value())


def test_who_is_interrupted_waits_for_the_end_of_what_he_stops() -> None:
    thread, has_begun, ended = LoopThread(), threading.Event(), []

    async def work() -> None:
        has_begun.set()
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            await asyncio.sleep(0.05)
            ended.append(True)

    def interrupt() -> None:
        has_begun.wait(DEADLINE_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert ended == [True]
    thread.close()


@pytest.mark.parametrize("way", ["http", "handle"])
def test_ctrl_c_stops_what_is_generated(way: str, app: App) -> None:
    app.story = [*STORY[:2], WAIT, *STORY[2:]]

    def interrupt() -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not app.submitted and time.monotonic() < deadline_s:
            time.sleep(0.002)
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with Cosmos3Client(connected(app, way)) as client:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate(GenerationRequest(prompt="a"))
        assert len(app.stopped) == 1


def num_threads() -> int:
    return sum(thread.name == "cosmos3-client" for thread in threading.enumerate())


@pytest.mark.parametrize("way", ["http", "handle"])
def test_a_client_that_is_dropped_ends_its_thread_and_what_it_follows(way: str, app: App) -> None:
    gc.collect()
    before = num_threads()
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    for event in Cosmos3Client(connected(app, way)).stream(GenerationRequest(prompt="a")):
        if event.kind == "step":
            app.delay_s = 0.05
            break
    deadline_s = time.monotonic() + DEADLINE_S
    while num_threads() > before and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert num_threads() == before
    assert len(app.stopped) == 1


def test_a_client_may_be_closed_twice_and_then_says_so(app: App) -> None:
    client = Cosmos3Client(connected(app, "http"))
    client.models()
    client.close()
    client.close()
    with pytest.raises(ClosedError, match="the client is closed"):
        client.models()


def test_threads_share_a_client(app: App) -> None:
    videos: list[str] = []

    def ask() -> None:
        videos.append(client.generate(GenerationRequest(prompt="a")).video.id)

    with Cosmos3Client(connected(app, "http")) as client:
        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert len(set(videos)) == 16
