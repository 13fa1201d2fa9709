"""Answers made of a Director's events, which is a stand-in here: files, JSON, zips, and what becomes of refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import OverloadedError
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.api import exchange
from deployments.api.bodies import ImageJob, parse_image_body
from deployments.api.body_room import BodyRoom
from deployments.api.exchange import Exchange, answered
from deployments.api.media_answer import images_answer, media_answer
from deployments.messages import Accepted, Finished, MediaPart, StepDone

FINISHED = Finished(
    request_id="r",
    mode="text_to_video",
    media_type="video/mp4",
    num_bytes=6,
    num_frames=5,
    fps=24.0,
    height=32,
    width=64,
    seed=7,
    frames_sha256="abc",
    negative_origin="built-in",
    notes=("a note",),
    stage_seconds={"denoise": 1.23456, "total": 2.0},
)
ACTIONS = GeneratedActions(np.array([[0.1, 2.0]], np.float32), "av", 1, True)


class Director:
    """Answers each request with the next of some scripts: events and errors in order. Notes what it was asked."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.asked: list[tuple[GenerationRequest, str, float | None]] = []
        self.streams: list[Stream] = []
        self.stream = self

    def remote(self, request: GenerationRequest, request_id: str, timeout_s: float | None) -> Stream:
        self.asked.append((request, request_id, timeout_s))
        self.streams.append(Stream(self._scripts.pop(0)))
        return self.streams[-1]


class Stream:
    def __init__(self, script: list[Any]) -> None:
        self._script = script
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._script:
            raise StopAsyncIteration
        item = self._script.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


def script(finished: Finished = FINISHED, *parts: bytes) -> list[Any]:
    accepted = Accepted("r", 2, 5, 7, (), 1)
    return [accepted, StepDone(1, 2, 0.5, 1), finished, *(MediaPart(data) for data in parts or (b"abc", b"def"))]


def image(seed: int, media_type: str = "image/png") -> list[Any]:
    return script(replace(FINISHED, seed=seed, media_type=media_type), b"image%d" % (seed % 10))


async def sent(response: Response) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body as they go out."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return messages[0]["status"], headers, b"".join(message.get("body", b"") for message in messages)


def answer(director: Director, job: ImageJob | None = None, room: int = 10_000, timeout_s: float = 60) -> Any:
    """(status, headers, body) of what was made of the Director's events."""
    bodies = BodyRoom(room)

    async def work(an_exchange: Exchange) -> Response:
        with bodies.hold() as held:
            await an_exchange.ask(GenerationRequest() if job is None else job.requests[0])
            made = media_answer(an_exchange, held) if job is None else images_answer(an_exchange, job, held)
            return await made

    async def run() -> Any:
        request = Request({"type": "http", "headers": [(b"x-request-id", b"mine")]})
        return await sent(await answered(request, director, timeout_s, work))

    status, headers, body = asyncio.run(run())
    assert bodies.taken_bytes == 0
    assert {stream.is_cancelled for stream in director.streams} <= {True}, "nothing runs on"
    assert {request_id for _, request_id, _ in director.asked} <= {"mine"}
    return status, headers, json.loads(body) if headers["content-type"] == "application/json" else body


def test_a_file_is_the_answer_itself() -> None:
    status, headers, body = answer(Director(script()))
    assert (status, body) == (200, b"abcdef")
    assert headers["content-type"] == "video/mp4"
    assert headers["content-length"] == "6"
    assert (headers["x-mode"], headers["x-seed"], headers["x-notes"]) == ("text_to_video", "7", '["a note"]')
    assert json.loads(headers["x-stage-durations"]) == {"denoise": 1.2346, "total": 2.0}


@pytest.mark.parametrize("has_file", [True, False])
def test_generated_actions_are_json_with_the_file_in_it(has_file: bool) -> None:
    finished = replace(FINISHED, mode="policy", actions=ACTIONS)
    if not has_file:
        finished = replace(finished, media_type="", num_bytes=0)
    status, headers, body = answer(Director(script(finished) if has_file else script(finished)[:3]))
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "application/json", "7")
    assert int(headers["content-length"]) > 100
    assert (body["id"], body["mode"], body["seed"], body["notes"]) == ("r", "policy", 7, ["a note"])
    assert body["actions"] == ACTIONS.as_json()
    again = GeneratedActions.from_json(body["actions"])
    assert again.values.tobytes() == ACTIONS.values.tobytes()
    video = {"media_type": "video/mp4", "b64_json": base64.b64encode(b"abcdef").decode()}
    assert body["video"] == (video if has_file else None)
    assert body["stage_durations"] == {"denoise": 1.2346, "total": 2.0}


def test_a_result_is_never_refused_and_new_bodies_make_room_for_it() -> None:
    finished = replace(FINISHED, actions=ACTIONS)
    assert answer(Director(script(finished)), room=0)[0] == 200
    room = BodyRoom(1000)
    with room.hold() as result, room.hold() as body:
        result.need(1200)
        assert room.taken_bytes == 1200
        with pytest.raises(OverloadedError):
            body.grow_to(1)
    with room.hold() as body:
        body.grow_to(1000)


def images(n: int, **fields: Any) -> ImageJob:
    return parse_image_body({"prompt": "a", "n": n, "seed": 3, **fields}, "nano")


def test_images_come_as_json() -> None:
    director = Director(image(3), image(4))
    status, _, body = answer(director, images(2))
    assert status == 200
    assert abs(body["created"] - time.time()) < 60
    assert (body["output_format"], body["size"]) == ("png", "64x32")
    assert body["metrics"]["stage_durations"] == {"denoise": 2.4691, "total": 4.0}
    assert [base64.b64decode(item["b64_json"]) for item in body["data"]] == [b"image3", b"image4"]
    assert [item["seed"] for item in body["data"]] == [3, 4]
    assert {(item["url"], item["revised_prompt"]) for item in body["data"]} == {(None, None)}
    (first, _, first_timeout_s), (second, _, second_timeout_s) = director.asked
    assert (first.seed, second.seed) == (3, 4)
    assert first_timeout_s is None, "the app's own"
    assert 50 < second_timeout_s < 60, "what is left"  # type: ignore[operator]


def test_images_as_files() -> None:
    job = images(1, response_format="file", output_format="jpeg")
    status, headers, body = answer(Director(image(3, "image/jpeg")), job, room=0)
    assert (status, headers["content-type"], headers["x-seed"], body) == (200, "image/jpeg", "3", b"image3")
    job = images(2, response_format="file", output_format="jpeg")
    director = Director(image(3, "image/jpeg"), image(4, "image/jpeg"))
    status, headers, body = answer(director, job)
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "application/zip", "3,4")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"0.jpg": b"image3", "1.jpg": b"image4"}


def test_a_full_queue_is_waited_out_once_the_first_image_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LONGEST_PAUSE_S", 0.01)
    full = OverloadedError("requests", 4, 2.0)
    director = Director(image(3), [full], [*image(4)[:1], full], image(4))
    status, _, body = answer(director, images(2))
    assert (status, [item["seed"] for item in body["data"]]) == (200, [3, 4])
    assert [request.seed for request, _, _ in director.asked] == [3, 4, 4, 4]
    # The first one is refused like any request.
    status, headers, body = answer(Director([full]), images(2))
    assert (status, headers["retry-after"], body["error"]["code"]) == (429, "2", "overloaded")


def test_waiting_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(exchange, "_SLACK_S", 0.0)
    full = OverloadedError("requests", 4, 2.0)
    status, _, body = answer(Director(image(3), *([full] for _ in range(1000))), images(2), timeout_s=0.3)
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


def test_what_is_wrong_with_a_later_image_is_said() -> None:
    wrong = RequestError("seed", 1, "another")
    status, _, body = answer(Director(image(3), [wrong]), images(2))
    assert (status, body["error"]["param"]) == (422, "seed")


def test_an_unknown_error_says_nothing_of_the_inside() -> None:
    status, _, body = answer(Director([ZeroDivisionError("a secret")]))
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)
