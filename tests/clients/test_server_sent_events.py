"""Parsing server-sent events, cut anywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx2
import pytest

from deployments.clients import http_connection
from deployments.clients.errors import AnswerError
from deployments.clients.http_connection import Answer, RawEvent
from deployments.clients.transport import Deadline
from tests.settling import run

TEXT = (
    "\ufeff: hello\n\n"
    'event: queued\ndata: {"position": 1}\n\n'
    'id: 1\r\nevent: step\r\ndata: {"text":\r\ndata: "ä"}\r\n\r\n'
    "id:2\revent:step\rdata:{}\r\r"
    ": keep-alive\n\n"
    "retry: 10\nid: 3\n\n"
    "event: empty\ndata:\n\n"
    "data: {}\n\n"
    "id: 4\nevent: lost\ndata: {}\n"
).encode()
EVENTS = [
    RawEvent(None, "queued", {"position": 1}),
    RawEvent(1, "step", {"text": "ä"}),
    RawEvent(2, "step", {}),
    RawEvent(None, "message", {}),
]


def read_events(parts: Sequence[bytes]) -> list[RawEvent]:
    """Read the events of an answer that arrives in parts."""

    async def send() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def read() -> list[RawEvent]:
        headers = {"content-type": "text/event-stream"}
        response = httpx2.Response(200, headers=headers, content=send(), request=httpx2.Request("GET", "http://app"))
        return [event async for event in Answer("http://app", response, Deadline(60)).iter_events()]

    return run(read())


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 7, 64, 1000])
def test_events_are_the_same_for_every_cut(num_bytes: int) -> None:
    assert read_events([TEXT[start : start + num_bytes] for start in range(0, len(TEXT), num_bytes)]) == EVENTS


@pytest.mark.parametrize("data", ["{", "[]", "3", "{}\nid: one"])
def test_invalid_events_are_refused(data: str) -> None:
    with pytest.raises(AnswerError, match="sends an event 'step' that is no JSON object"):
        read_events([f"event: step\ndata: {data}\n\n".encode()])


def test_the_length_of_an_event_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "_MAX_EVENT_BYTES", 1000)
    for text in (b"data: " + b"x" * 1000, b"data: x\n" * 200, b"x" * 1001):
        with pytest.raises(AnswerError, match="exceeded the 1000 byte limit"):
            read_events([text])
    assert len(read_events([b"data: {}\n\n"] * 100)) == 100, "many short events are not one long event"
