"""The event loop thread of a blocking client: results, interrupts, shutdown."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cosmos3_core.errors import ClosedError
from cosmos3_core.request import GenerationRequest
from deployments.client import Cosmos3Client
from deployments.clients import blocking
from deployments.clients.blocking import LoopThread
from tests.clients.app_double import STORY, WAIT, App
from tests.clients.conftest import connect_to

DEADLINE_S = 30.0


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Enable Ctrl-C, which jobs in the background of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_run_returns_the_result_or_raises() -> None:
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
        return thread.run(value())  # would deadlock

    with pytest.raises(ClosedError):
        thread.run(inside())
    thread.close()
    thread.close()
    with pytest.raises(ClosedError):
        thread.run(value())


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_call_waits_for_its_cancellation() -> None:
    thread, has_begun, ended = LoopThread(), threading.Event(), []

    async def work() -> None:
        has_begun.set()
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            await asyncio.sleep(0.05)
            ended.append(True)

    def interrupt_work() -> None:
        has_begun.wait(DEADLINE_S)
        interrupt()

    threading.Thread(target=interrupt_work).start()
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert ended == [True]
    thread.close()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_just_before_the_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes before the wait does not wake it."""
    thread, ended = LoopThread(), []

    class NeverWoken:
        """A queue whose first ``get`` starts just after the signal."""

        def __init__(self) -> None:
            self._items: list[Any] = []
            self._has_come = False

        def put(self, item: Any) -> None:
            self._items.append(item)

        def get(self, timeout: float = DEADLINE_S) -> Any:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                if not self._has_come:
                    self._has_come = True
                    interrupt()
                deadline_s = time.monotonic() + timeout
                while not self._items and time.monotonic() < deadline_s:
                    time.sleep(0.002)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return self._items.pop(0)

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    monkeypatch.setattr(blocking.queue, "SimpleQueue", NeverWoken)
    monkeypatch.setattr(blocking, "_NOTICE_S", 0.05)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    thread.close()
    assert ended == [True], "it was not slept through"


@pytest.mark.parametrize("is_handed_over", [False, True])
def test_an_interrupt_during_submission_leaves_no_task(is_handed_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_STOP_S", DEADLINE_S)
    thread, num_calls = LoopThread(), 0
    hand_over = thread._loop.call_soon_threadsafe

    def interrupt(*arguments: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1 or is_handed_over:
            hand_over(*arguments)
        if num_calls == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(thread._loop, "call_soon_threadsafe", interrupt)
    work = asyncio.sleep(DEADLINE_S)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED
    assert thread.run(asyncio.sleep(0, 3)) == 3
    thread.close()


def test_closing_a_client_fails_its_pending_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_STOP_S", 0.05)
    thread, has_begun, raised = LoopThread(), threading.Event(), []

    async def work() -> None:
        has_begun.set()
        await asyncio.sleep(DEADLINE_S)

    def wait() -> None:
        try:
            thread.run(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert has_begun.wait(DEADLINE_S)
    thread.close()
    waiter.join(DEADLINE_S)
    assert [type(error) for error in raised] == [ClosedError]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("transport", ["http", "handle"])
def test_ctrl_c_cancels_generate(transport: str, app: App) -> None:
    app.story = [*STORY[:2], WAIT, *STORY[2:]]

    def interrupt_work() -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not app.submitted and time.monotonic() < deadline_s:
            time.sleep(0.002)
        interrupt()

    with Cosmos3Client(connect_to(app, transport)) as client:
        threading.Thread(target=interrupt_work).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate(GenerationRequest(prompt="a"))
        assert len(app.stopped) == 1


def num_threads() -> int:
    return sum(thread.name == "cosmos3-client" for thread in threading.enumerate())


@pytest.mark.parametrize("transport", ["http", "handle"])
def test_a_dropped_client_ends_its_thread_and_streams(transport: str, app: App) -> None:
    gc.collect()
    before = num_threads()
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    for event in Cosmos3Client(connect_to(app, transport)).stream(GenerationRequest(prompt="a")):
        if event.kind == "step":
            app.delay_s = 0.05
            break
    deadline_s = time.monotonic() + DEADLINE_S
    while num_threads() > before and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert num_threads() == before
    assert len(app.stopped) == 1


def test_a_client_may_be_closed_twice_and_then_refuses_calls(app: App) -> None:
    client = Cosmos3Client(connect_to(app, "http"))
    client.models()
    client.close()
    client.close()
    with pytest.raises(ClosedError, match="the client is closed"):
        client.models()


def test_threads_can_share_a_client(app: App) -> None:
    videos: list[str] = []

    def ask() -> None:
        videos.append(client.generate(GenerationRequest(prompt="a")).video.id)

    with Cosmos3Client(connect_to(app, "http")) as client:
        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert len(set(videos)) == 16
