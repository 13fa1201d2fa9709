"""Answers made from a scripted Director's events: files, JSON, zips, growing files, refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cluster.errors import OverloadedError, StageFailed
from cluster.events import StepDone
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.request import GenerationRequest
from deployments.api import call, exchange
from deployments.api.bodies import BodyRules, NamedFields, ParsedBody, parse_body
from deployments.api.body_reader import MemoryBudget
from deployments.api.call import answer_errors
from deployments.api.exchange import Exchange, answer_when_done, answer_while_growing
from deployments.api.fields import ImageBody
from deployments.api.generations import answer_with_images
from deployments.jobs.job import SubmitOptions, new_job_id
from deployments.media.layout import new_media_id
from deployments.media.store import MediaEntry, MediaStore
from deployments.messages import Accepted, FileStarted, Finished, StageRetried
from tests.api.content_answers import Answer, send_answer
from tests.serve_fakes import Method
from tests.settling import run, until

FINISHED = Finished(
    request_id="r",
    job_id="video_gen_1",
    mode="text_to_video",
    media_id="",
    media_type="video/mp4",
    num_bytes=0,
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
    """Plays one script of events, errors and waits per request, and records the requests."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.submitted: list[tuple[GenerationRequest, SubmitOptions, float | None]] = []
        self.stream = Method(self._stream)

    def _stream(
        self, request: GenerationRequest, options: SubmitOptions, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        self.submitted.append((request, options, timeout_s))
        return play(self._scripts.pop(0))


async def play(script: list[Any]) -> AsyncIterator[Any]:
    """Yield the events of a script, raise its errors, await its waits."""
    for item in script:
        if isinstance(item, BaseException):
            raise item
        if callable(item):
            await item()
        else:
            yield item


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path, max_bytes=1 << 20, keep_s=1000)


def store_file(store: MediaStore, finished: Finished = FINISHED, data: bytes = b"abcdef") -> Finished:
    """Make a file in the store; return its event."""
    media_id = new_media_id(new_job_id())
    entry = store.create(media_id, finished.media_type, ".bin", is_live=False)
    entry.path.write_bytes(data)
    return replace(finished, media_id=media_id, num_bytes=entry.finish().num_bytes)


def script(finished: Finished) -> list[Any]:
    return [Accepted("r", "video_gen_1", 2, 5, 7, (), 1), StepDone(1, 2, 0.5, 0.1, 1), finished]


def image(store: MediaStore, seed: int, media_type: str = "image/png") -> list[Any]:
    finished = replace(FINISHED, seed=seed, media_type=media_type)
    return script(store_file(store, finished, b"image%d" % (seed % 10)))


def answer_script(
    store: MediaStore, director: Director, job: ImageBody | None = None, room: int = 10_000, timeout_s: float = 60
) -> Any:
    """Answer from the scripts; return (status, headers, body)."""
    bodies = MemoryBudget(room)

    async def work() -> Response:
        async with Exchange.open(director, "mine", timeout_s) as an_exchange:
            with bodies.reserve() as held:
                options = SubmitOptions(request_id=an_exchange.request_id)
                await an_exchange.submit(GenerationRequest() if job is None else job.requests[0], options)
                assert an_exchange.job_id == "video_gen_1"
                if job is None:
                    return await answer_when_done(an_exchange, held, store)
                return await answer_with_images(an_exchange, job, options, held, store)

    async def send() -> Answer:
        return await send_answer(await answer_errors(work(), "POST /"))

    answer = run(send())
    assert bodies.taken_bytes == 0
    assert {response.is_cancelled for response in director.stream.responses} <= {True}, "nothing runs on"
    assert {options.request_id for _, options, _ in director.submitted} <= {"mine"}
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, answer.headers, json.loads(answer.body) if is_json else answer.body


def test_a_file_is_the_body(store: MediaStore) -> None:
    finished = store_file(store)
    status, headers, body = answer_script(store, Director(script(finished)))
    assert (status, body) == (200, b"abcdef")
    assert headers["content-type"] == "video/mp4"
    assert headers["content-length"] == "6"
    assert headers["x-video-id"] == "video_gen_1"
    assert (headers["x-mode"], headers["x-seed"], headers["x-notes"]) == ("text_to_video", "7", '["a note"]')
    assert json.loads(headers["x-stage-durations"]) == {"denoise": 1.2346, "total": 2.0}


@pytest.mark.parametrize("has_file", [True, False])
def test_generated_actions_are_json_with_the_file_inside(has_file: bool, store: MediaStore) -> None:
    finished = replace(FINISHED, mode="policy", actions=ACTIONS)
    finished = store_file(store, finished) if has_file else replace(finished, media_type="")
    status, headers, body = answer_script(store, Director(script(finished)))
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "application/json", "7")
    assert int(headers["content-length"]) > 100
    assert (body["id"], body["mode"], body["seed"], body["notes"]) == ("video_gen_1", "policy", 7, ["a note"])
    assert body["actions"] == ACTIONS.as_json()
    again = GeneratedActions.from_json(body["actions"])
    assert again.values.tobytes() == ACTIONS.values.tobytes()
    video = {"media_type": "video/mp4", "b64_json": base64.b64encode(b"abcdef").decode()}
    assert body["video"] == (video if has_file else None)
    assert body["stage_durations"] == {"denoise": 1.2346, "total": 2.0}


def test_a_result_is_never_refused_but_blocks_new_bodies(store: MediaStore) -> None:
    finished = store_file(store, replace(FINISHED, actions=ACTIONS))
    assert answer_script(store, Director(script(finished)), room=0)[0] == 200
    room = MemoryBudget(1000)
    with room.reserve() as result, room.reserve() as body:
        result.grow_past_bound_by(1200)
        assert room.taken_bytes == 1200
        with pytest.raises(OverloadedError):
            body.grow_to(1)
    with room.reserve() as body:
        body.grow_to(1000)


def images(n: int, **fields: Any) -> ParsedBody[ImageBody]:
    body = {"prompt": "a", "n": n, "seed": 3, **fields}
    return parse_body(NamedFields.of(body, ImageBody), BodyRules(("nano", "nvidia/Cosmos3-Nano"), ("standard",)))


def test_images_are_json_with_base64(store: MediaStore) -> None:
    director = Director(image(store, 3), image(store, 4))
    status, _, body = answer_script(store, director, images(2))
    assert status == 200
    assert abs(body["created"] - time.time()) < 60
    assert (body["output_format"], body["size"]) == ("png", "64x32")
    assert body["metrics"]["stage_durations"] == {"denoise": 2.4691, "total": 4.0}
    assert [base64.b64decode(item["b64_json"]) for item in body["data"]] == [b"image3", b"image4"]
    assert [item["seed"] for item in body["data"]] == [3, 4]
    assert {(item["url"], item["revised_prompt"]) for item in body["data"]} == {(None, None)}
    (first, _, first_timeout_s), (second, _, second_timeout_s) = director.submitted
    assert (first.seed, second.seed) == (3, 4)
    assert first_timeout_s is None, "the app's own"
    assert 50 < second_timeout_s < 60, "what is left"  # type: ignore[operator]


def test_images_as_files_are_one_file_or_a_zip(store: MediaStore) -> None:
    job = images(1, response_format="file", output_format="jpeg")
    status, headers, body = answer_script(store, Director(image(store, 3, "image/jpeg")), job, room=0)
    assert (status, headers["content-type"], headers["x-seed"], body) == (200, "image/jpeg", "3", b"image3")
    job = images(2, response_format="file", output_format="jpeg")
    director = Director(image(store, 3, "image/jpeg"), image(store, 4, "image/jpeg"))
    status, headers, body = answer_script(store, director, job)
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "application/zip", "3,4")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"0.jpg": b"image3", "1.jpg": b"image4"}


def test_after_the_first_image_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch, store: MediaStore) -> None:
    monkeypatch.setattr(exchange, "_LONGEST_PAUSE_S", 0.01)
    full = OverloadedError("requests", 4, 2.0)
    director = Director(image(store, 3), [full], [*image(store, 4)[:1], full], image(store, 4))
    status, _, body = answer_script(store, director, images(2))
    assert (status, [item["seed"] for item in body["data"]]) == (200, [3, 4])
    assert [request.seed for request, _, _ in director.submitted] == [3, 4, 4, 4]
    # The first image is refused like any request.
    status, headers, body = answer_script(store, Director([full]), images(2))
    assert (status, headers["retry-after"], body["error"]["code"]) == (429, "2", "overloaded")


def test_waiting_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch, store: MediaStore) -> None:
    monkeypatch.setattr(exchange, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(exchange, "_SLACK_S", 0.0)
    full = OverloadedError("requests", 4, 2.0)
    status, _, body = answer_script(
        store, Director(image(store, 3), *([full] for _ in range(1000))), images(2), timeout_s=0.3
    )
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


def test_an_error_of_a_later_image_is_the_answer(store: MediaStore) -> None:
    wrong = RequestError("seed", 1, "another")
    status, _, body = answer_script(store, Director(image(store, 3), [wrong]), images(2))
    assert (status, body["error"]["param"]) == (422, "seed")


def test_an_unknown_error_reveals_no_internals(store: MediaStore) -> None:
    status, _, body = answer_script(store, Director([ZeroDivisionError("a secret")]))
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)


def test_a_file_missing_from_the_store_is_a_503(
    store: MediaStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call.logger, "propagate", True)
    status, _, body = answer_script(store, Director(script(replace(FINISHED, media_id="0" * 32))))
    assert (status, body["error"]["code"]) == (503, "media_unavailable")
    assert str(store.directory) not in json.dumps(body)
    assert str(store.directory) in caplog.text, "the log says where"


# Growing files


class Growing:
    """A growing clip and its request's events."""

    def __init__(self, store: MediaStore) -> None:
        media_id = new_media_id(new_job_id())
        self.entry: MediaEntry = store.create(media_id, "video/mp4", ".mp4", is_live=True)
        self.begin = [
            Accepted("r", "video_gen_1", 2, 5, 7, (), 1),
            StepDone(1, 2, 0.5, 0.1, 1),
            FileStarted(media_id, "video/mp4", 1),
        ]
        self.finished = replace(FINISHED, media_id=media_id)

    def grow(self, data: bytes) -> None:
        assert self.entry.live_path is not None
        with self.entry.live_path.open("ab") as file:
            file.write(data)

    def finish(self) -> None:
        self.entry.path.write_bytes(b"finished")
        self.entry.finish()


class Viewer:
    """Everything sent of a growing answer.

    Args:
        on_part: called with everything sent so far, after each part.
    """

    def __init__(self, on_part: Callable[[bytes], Awaitable[None]]) -> None:
        self._on_part = on_part
        self.headers: dict[str, str] = {}
        self.status, self.body, self.is_whole = 0, b"", False

    async def watch(self, store: MediaStore, director: Director) -> None:
        async def work() -> Response:
            async with Exchange.open(director, None, 60) as an_exchange:
                await an_exchange.submit(GenerationRequest(), SubmitOptions())
                return await answer_while_growing(an_exchange, store)

        async def receive() -> Any:
            await asyncio.sleep(60)

        async with asyncio.timeout(60):
            response = await answer_errors(work(), "POST /")
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, self._send)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        self.body += message["body"]
        self.is_whole = not message.get("more_body", False)
        if not self.is_whole:
            await self._on_part(self.body)


def test_an_answer_grows_with_its_file(store: MediaStore) -> None:
    growing, is_finished = Growing(store), asyncio.Event()

    async def go_on(body: bytes) -> None:
        if body == b"one":
            growing.grow(b"two")
        else:
            growing.finish()
            is_finished.set()

    growing.grow(b"one")
    director = Director([*growing.begin, StepDone(2, 2, 0.0, 0.1, 1), is_finished.wait, growing.finished])
    viewer = Viewer(go_on)
    asyncio.run(viewer.watch(store, director))
    assert (viewer.status, viewer.body, viewer.is_whole) == (200, b"onetwo", True)
    assert viewer.headers["content-type"] == "video/mp4"
    assert viewer.headers["x-video-id"] == "video_gen_1"
    assert "content-length" not in viewer.headers
    assert director.stream.responses[0].is_cancelled


async def do_nothing(body: bytes) -> None:
    """Do nothing after a part."""


def test_a_failure_before_the_file_begins_is_an_error_answer(store: MediaStore) -> None:
    director = Director([Accepted("r", "video_gen_1", 2, 5, 7, (), 1), RequestError("seed", 1, "another")])
    viewer = Viewer(do_nothing)
    asyncio.run(viewer.watch(store, director))
    assert (viewer.status, json.loads(viewer.body)["error"]["param"]) == (422, "seed")
    assert director.stream.responses[0].is_cancelled


def test_a_live_file_missing_from_the_store_is_a_503(store: MediaStore) -> None:
    director = Director([Accepted("r", "video_gen_1", 2, 5, 7, (), 1), FileStarted("0" * 32, "video/mp4", 1)])
    viewer = Viewer(do_nothing)
    asyncio.run(viewer.watch(store, director))
    assert (viewer.status, json.loads(viewer.body)["error"]["code"]) == (503, "media_unavailable")
    assert director.stream.responses[0].is_cancelled


@pytest.mark.parametrize("who", ["request", "file"])
def test_a_failure_of_request_or_file_breaks_the_connection(who: str, store: MediaStore) -> None:
    """Either reports it: the request, while its file just stops growing, or the file."""
    growing, has_failed = Growing(store), asyncio.Event()

    async def fail(body: bytes) -> None:
        if who == "request":
            has_failed.set()
        else:
            store.fail(growing.finished.media_id, "the encoder died")

    growing.grow(b"half")
    director = Director([*growing.begin, has_failed.wait, StageFailed("encode", 3, "died")])
    viewer = Viewer(fail)
    with pytest.raises((StageFailed, MediaError), match="died"):
        asyncio.run(viewer.watch(store, director))
    assert (viewer.status, viewer.body, viewer.is_whole) == (200, b"half", False)
    assert director.stream.responses[0].is_cancelled


def test_a_failed_request_breaks_the_connection_even_with_a_complete_file(store: MediaStore) -> None:
    growing, is_finished = Growing(store), asyncio.Event()

    async def finish(body: bytes) -> None:
        growing.finish()
        is_finished.set()

    async def later() -> None:
        await is_finished.wait()
        await asyncio.sleep(0.3)  # the reader has seen the file's end

    growing.grow(b"whole")
    director = Director([*growing.begin, later, StageFailed("encode", 3, "died")])
    viewer = Viewer(finish)
    with pytest.raises(StageFailed, match="died"):
        asyncio.run(viewer.watch(store, director))
    assert (viewer.body, viewer.is_whole) == (b"whole", False)


@pytest.mark.parametrize("how", ["file says so first", "director says so first", "nobody says so of the file"])
def test_a_file_that_fails_before_its_first_byte_is_replaced(how: str, store: MediaStore) -> None:
    """The encoder died; the answer is another encoder's file."""
    dead, growing = Growing(store), Growing(store)
    is_finished = asyncio.Event()

    async def die() -> None:
        if how != "nobody says so of the file":
            store.fail(dead.finished.media_id, "the encoder died")
        if how == "file says so first":
            await asyncio.sleep(0.2)

    async def finish(body: bytes) -> None:
        growing.finish()
        is_finished.set()

    growing.grow(b"one")
    script = [*dead.begin, die, StageRetried("encode", 2, "died", 0), growing.begin[-1], is_finished.wait]
    director = Director([*script, growing.finished])
    viewer = Viewer(finish)
    asyncio.run(viewer.watch(store, director))
    assert (viewer.status, viewer.body, viewer.is_whole) == (200, b"one", True)
    assert viewer.headers["x-video-id"] == "video_gen_1"
    assert director.stream.responses[0].is_cancelled


def test_if_every_encoder_fails_the_answer_is_an_error(store: MediaStore) -> None:
    dead = Growing(store)
    store.fail(dead.finished.media_id, "the encoder died")
    director = Director([*dead.begin, StageFailed("encode", 3, "died")])
    viewer = Viewer(do_nothing)
    asyncio.run(viewer.watch(store, director))
    assert (viewer.status, json.loads(viewer.body)["error"]["code"]) == (503, "stage_failed")
    assert director.stream.responses[0].is_cancelled


def test_disconnecting_before_the_first_byte_stops_the_request(store: MediaStore) -> None:
    growing = Growing(store)
    growing.grow(b"a")
    director = Director([*growing.begin, asyncio.Event().wait])

    async def send(message: Any) -> None:
        raise OSError("gone")

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def run() -> None:
        an_exchange = Exchange(director, "r", 60)
        await an_exchange.submit(GenerationRequest(), SubmitOptions())
        response = await answer_while_growing(an_exchange, store)
        with pytest.raises(ClientDisconnect):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        assert director.stream.responses[0].is_cancelled

    asyncio.run(run())


def test_disconnecting_from_a_growing_file_stops_the_request(store: MediaStore) -> None:
    growing, came = Growing(store), asyncio.Event()

    async def stall(body: bytes) -> None:
        came.set()
        await asyncio.sleep(60)

    async def run() -> None:
        watching = asyncio.create_task(Viewer(stall).watch(store, director))
        await came.wait()
        assert not director.stream.responses[0].is_cancelled
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    growing.grow(b"a")
    director = Director([*growing.begin, asyncio.Event().wait])
    asyncio.run(run())
    assert director.stream.responses[0].is_cancelled
