"""Log lines about requests: their fields and ids, what they must not contain, and lines made from events."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from cluster.errors import GangFailed, OverloadedError
from cluster.events import StepDone
from cluster.logs import JsonLines, LogOrigin, RankLog, log_event, log_failure, one_line
from cosmos3_core.errors import RequestError
from deployments.messages import (
    ChunkDecoded,
    ChunkEncoded,
    ClipEncoded,
    Event,
    LatentsReady,
    RequestContext,
    StageRetried,
)
from deployments.observability import logs
from deployments.observability.logs import watch_request, watch_stage
from tests.observability.recording import RecordingMetrics

ORIGIN = LogOrigin("otter-1", "video_gen_1", 2)


class Lines:
    """A logger that writes JSON, and what was written."""

    def __init__(self) -> None:
        self._written = io.StringIO()
        self.handler = logging.StreamHandler(self._written)
        self.handler.setFormatter(JsonLines(rank=3))
        self.logger = logging.Logger("cluster.test")
        self.logger.addHandler(self.handler)

    @property
    def text(self) -> str:
        return self._written.getvalue()

    @property
    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.all]


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def stage_lines(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Lines of stages, captured in place of Serve's log."""
    monkeypatch.setattr(logs, "logger", lines.logger)
    return lines


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> RecordingMetrics:
    recording = RecordingMetrics()
    monkeypatch.setattr(logs, "metrics", lambda: recording)
    return recording


def test_a_line_has_its_fields_and_its_request_id(lines: Lines) -> None:
    log_event(lines.logger, "begin done", ORIGIN, phase="begin", seconds=0.1234567, nothing=None, bad=float("nan"))
    (line,) = lines.all
    fields = {"event": "begin done", "phase": "begin", "seconds": 0.123457, "bad": "nan", "rank": 3}
    assert line.items() >= (fields | vars(ORIGIN)).items()
    assert "nothing" not in line
    assert line["message"] == "begin done job_id=video_gen_1 attempt=2 phase=begin seconds=0.123457 bad=nan"
    assert line["filename"] == "test_logs.py"


def test_serves_own_request_id_does_not_take_ours_place(lines: Lines) -> None:
    class AsServe(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.request_id, record.deployment = "serves-own", "Transformer"
            del record.job_id  # type: ignore[attr-defined]
            return True

    lines.handler.addFilter(AsServe())
    log_event(lines.logger, "stage began", ORIGIN)
    (line,) = lines.all
    assert (line["request_id"], line["job_id"], line["deployment"]) == ("otter-1", "video_gen_1", "Transformer")


@pytest.mark.parametrize(
    "given", ["a\nb", "a\r\nb", "a\x1b[2Kb", "a\u2028b", "a\u0085b", "a\x00b", "a\u202eb", "a\ud800b", "x" * 10_000]
)
def test_no_value_can_start_a_line_or_control_a_terminal(lines: Lines, given: str) -> None:
    log_event(lines.logger, "stage began", LogOrigin(given, given), reason=given)
    log_failure(lines.logger, "stage failed", ORIGIN, GangFailed("step", given))
    text = lines.text
    assert len(text) < 5000
    assert text.count("\n") == 2 == len(text.splitlines())
    for line in lines.all:
        assert all(str(value).isprintable() for value in line.values()), line


def test_one_line_texts_are_unchanged() -> None:
    assert one_line("Ein Otter, 水獺") == "Ein Otter, 水獺"
    assert one_line("abcdef", 5) == "ab..."
    assert one_line("a\nb") == "a\\nb"


def test_inputs_are_not_logged(lines: Lines) -> None:
    for error in (RequestError("prompt", "an otter", "shorter ones"), ValueError("an otter"), KeyError("an otter")):
        try:
            raise error
        except (ValueError, KeyError) as raised:
            log_failure(lines.logger, "stage failed", ORIGIN, raised)
    assert "otter" not in lines.text.replace("otter-1", "")
    first, second, _ = lines.all
    assert (first["error"], first["reason"]) == ("RequestError", "prompt must be shorter ones")
    assert second["reason"].startswith("raised in test_logs.py, line ")


def test_disabled_levels_write_no_line(lines: Lines) -> None:
    lines.logger.setLevel(logging.WARNING)
    log_event(lines.logger, "stage began", ORIGIN)
    assert lines.text == ""


def test_a_rank_logs_the_start_and_end_of_a_request(lines: Lines) -> None:
    log = RankLog(lines.logger)
    with log.begin("a", ORIGIN):
        pass
    for _ in range(2):
        with log.resume("a", "step"):
            pass
    log.end("a")
    log.end("a")
    assert lines.events == ["begin done", "work ended"]
    assert lines.all[1]["num_calls"] == 2
    with log.begin("warm up", None), log.resume("warm up", "step"):
        pass
    log.end("warm up")
    assert len(lines.all) == 2


def test_a_rank_logs_failures_and_drops_refused_requests(lines: Lines) -> None:
    log = RankLog(lines.logger)
    with pytest.raises(RequestError), log.begin("a", ORIGIN):
        raise RequestError("seed", 1, "2")
    log.end("a")
    assert lines.events == ["begin failed"]
    with log.begin("b", ORIGIN):
        pass
    with pytest.raises(ZeroDivisionError), log.resume("b", "step"):
        raise ZeroDivisionError
    log.end("b")
    assert lines.events == ["begin failed", "begin done", "step failed", "work ended"]
    assert [line["levelname"] for line in lines.all] == ["WARNING", "INFO", "WARNING", "INFO"]
    assert log == RankLog(lines.logger)


def context() -> RequestContext:
    return RequestContext.new("otter-1", 60)


def outcomes(recording: RecordingMetrics) -> list[tuple[str, str]]:
    return [(stage, outcome) for _, stage, outcome in recording.values_of("cosmos3_stage_seconds")]


def test_a_stage_logs_finished_failed_full_or_left(stage_lines: Lines, recording: RecordingMetrics) -> None:
    with watch_stage(context(), "tokenize") as watch:
        pass
    with watch_stage(context(), "encode") as watch:
        watch.finish(num_frames=9)
    for error in (GangFailed("step", "a rank died"), OverloadedError("places", 4, 1.0)):
        with pytest.raises(type(error)), watch_stage(context(), "denoise"):
            raise error
    with pytest.raises(asyncio.CancelledError), watch_stage(context(), "decode"):
        raise asyncio.CancelledError
    ends = [("tokenize", "finished"), ("encode", "finished"), ("denoise", "failed"), ("denoise", "full")]
    assert outcomes(recording) == [*ends, ("decode", "left")]
    assert stage_lines.events[1::2] == [f"stage {outcome}" for _, outcome in outcomes(recording)]
    assert set(stage_lines.events[::2]) == {"stage began"}
    failed = stage_lines.all[5]
    assert failed["reason"] == "the gang failed during 'step': a rank died"
    assert failed["seconds"] >= 0


def test_leaving_after_the_last_item_counts_as_finished(stage_lines: Lines, recording: RecordingMetrics) -> None:
    async def stage() -> AsyncIterator[int]:
        with watch_stage(context(), "denoise") as watch:
            yield 1
            watch.finish()
            yield 2

    async def take(most: int) -> None:
        async with aclosing(stage()) as items:  # type: ignore[type-var]
            async for item in items:
                if item == most:
                    return

    asyncio.run(take(2))
    asyncio.run(take(1))
    assert outcomes(recording) == [("denoise", "finished"), ("denoise", "left")]


def test_a_requests_events_are_passed_on_and_measured(stage_lines: Lines, recording: RecordingMetrics) -> None:
    events: list[Event] = [
        StageRetried("denoise", 2, "the gang\nfailed", 5),
        StepDone(6, 8, 0.5, 0.1, 1),
        LatentsReady(1.0, ("video",), 1, (2,)),
        ChunkDecoded(0, 0.0, 1),
        ChunkEncoded(0, 4, 1, 0.0, 1),
        ChunkDecoded(1, 0.0, 1),
        ChunkEncoded(1, 4, 1, 0.0, 1),
        ClipEncoded("media", "sha", 8, 1234, 0.5, 1),
    ]

    async def pipeline() -> AsyncIterator[Event]:
        for event in events:
            yield event

    async def follow() -> list[Event]:
        return [event async for event in watch_request(pipeline(), context(), "text_to_video", waited_s=100.0)]

    assert asyncio.run(follow()) == events
    names = [name for name, *_ in recording.values]
    assert names == [
        "cosmos3_stage_retries",
        "cosmos3_first_chunk_seconds",
        "cosmos3_first_byte_seconds",
        "cosmos3_file_bytes",
        "cosmos3_stage_seconds",
    ]
    values = {name: value for name, value, _ in recording.values}
    assert 0 <= values["cosmos3_first_chunk_seconds"] < 60
    assert 100 <= values["cosmos3_first_byte_seconds"] < 160
    assert values["cosmos3_file_bytes"] == 1234
    assert stage_lines.events == ["stage began", "stage retried", "stage finished"]
    assert {line["request_id"] for line in stage_lines.all} == {"otter-1"}


def test_leaving_a_request_ends_its_walk(stage_lines: Lines, recording: RecordingMetrics) -> None:
    has_ended = False

    async def pipeline() -> AsyncIterator[Event]:
        nonlocal has_ended
        try:
            while True:
                yield StepDone(1, 8, 0.5, 0.1, 1)
        finally:
            has_ended = True

    async def leave() -> None:
        watching = watch_request(pipeline(), context(), "text_to_video")
        await anext(watching)
        await watching.aclose()  # type: ignore[attr-defined]
        assert has_ended

    asyncio.run(leave())
    assert outcomes(recording) == [("request", "left")]
