"""Checking requests in place, and clips in a few other processes. Without Ray."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import CapabilityError
from cosmos3_core.media import child_reader
from cosmos3_core.request import GenerationRequest
from deployments.director import admission
from deployments.director.admission import RequestCheck
from deployments.messages import RequestContext
from tests.settling import run, settle, until

CLIP = GenerationRequest(prompt="a", video=b"a file", num_inference_steps=2)


@pytest.fixture
def layout(tiny_nano: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_nano)


def context(limit_s: float = 20) -> RequestContext:
    return RequestContext.new("r", limit_s)


class SlowResolve:
    """A stand-in for ``resolve`` that holds clips and counts concurrent calls."""

    def __init__(self, check: RequestCheck, limit_s: float = 60.0) -> None:
        self.limit_s, self.now, self.most, self.calls = limit_s, 0, 0, 0
        self.may_go_on = threading.Event()
        self.lock = threading.Lock()
        check._resolve = self  # type: ignore[assignment]

    def __call__(self, request: GenerationRequest) -> str:
        if request.video is None:
            return "resolved"
        with self.lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
        self.may_go_on.wait(self.limit_s)
        with self.lock:
            self.now -= 1
        return "resolved"


def test_clips_are_checked_in_other_processes(layout: CheckpointLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        child_reader, "_run_child", lambda request, *_: asked.append(request) or ({"info": [32, 48, 9]}, b"")
    )
    check = RequestCheck(layout, is_sound_offered=True)
    resolved = run(check.resolve(context(), CLIP))
    assert resolved.mode == "video_to_video"
    assert [request["command"] for request in asked] == ["probe"]


def test_concurrent_clip_checks_are_bounded_and_others_do_not_wait(layout: CheckpointLayout) -> None:
    async def body() -> None:
        check = RequestCheck(layout, is_sound_offered=True)
        slow = SlowResolve(check)
        clips = [asyncio.create_task(check.resolve(context(), CLIP)) for _ in range(6)]
        await until(lambda: slow.now == admission._MAX_PROBES)
        await check.resolve(context(), GenerationRequest(prompt="a"))
        assert not any(task.done() for task in clips)
        slow.may_go_on.set()
        await asyncio.gather(*clips)
        assert slow.most == admission._MAX_PROBES

    run(body())


def test_cancelled_checks_leave_no_work(layout: CheckpointLayout) -> None:
    async def body() -> None:
        check = RequestCheck(layout, is_sound_offered=True)
        slow = SlowResolve(check)
        clips = [asyncio.create_task(check.resolve(context(), CLIP)) for _ in range(20)]
        await until(lambda: slow.now == admission._MAX_PROBES)
        for task in clips:
            task.cancel()
        slow.may_go_on.set()
        await asyncio.gather(*clips, return_exceptions=True)
        await until(lambda: slow.now == 0)
        await settle()
        assert slow.calls == admission._MAX_PROBES
        assert await check.resolve(context(), CLIP) == "resolved", "their places are free again"

    run(body())


def test_checking_counts_towards_the_deadline(layout: CheckpointLayout) -> None:
    async def body() -> None:
        check = RequestCheck(layout, is_sound_offered=True)
        SlowResolve(check, limit_s=0.5)
        with pytest.raises(DeadlineExceeded):
            await check.resolve(context(0.1), CLIP)

    run(body())


def test_sound_is_refused_where_nothing_decodes_it(layout: CheckpointLayout) -> None:
    check = RequestCheck(layout, is_sound_offered=False)
    with pytest.raises(CapabilityError, match="configured without"):
        run(check.resolve(context(), GenerationRequest(prompt="a", generate_sound=True)))
