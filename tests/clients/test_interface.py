"""One interface, four clients: the same calls, values, events and errors over HTTP and handles, blocking and not."""

from __future__ import annotations

import base64
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import DeadlineExceeded, GangFailed, OutOfMemory, OverloadedError, ShuttingDown, StageFailed
from cluster.events import PreviewReady, PreviewsOff, QueuePosition, StepDone
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.errors import CapabilityError, MediaError, RequestError
from cosmos3_core.request import GenerationRequest
from deployments.client import AsyncCosmos3Client, Cosmos3Client, Patience, Video
from deployments.clients import transport
from deployments.clients.errors import AnswerError, NotFound, NotReady, Unavailable, UnreachableError
from deployments.errors import ContentBlocked, GuardrailUnavailable, IdempotencyConflict, JobCancelled, JobsError
from deployments.jobs.events import JobStarted, OtherEvent, VideoEnded, VideoEvent
from deployments.messages import ChunkEncoded, FileStarted, StageRetried
from tests.clients.app_double import STORY, WAIT, App
from tests.clients.conftest import InLoop, connect_to
from tests.settling import eventually

REQUEST = GenerationRequest(prompt="A red car.", num_frames=9, seed=7)
DEADLINE_S = 30.0


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        public = {name: call for name, call in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(getattr(kind, name)).parameters) for name in public}

    blocking, asynchronous = calls(Cosmos3Client), calls(AsyncCosmos3Client)
    assert blocking.pop("close") == asynchronous.pop("aclose")
    assert blocking == asynchronous


def test_every_blocking_call_documents_its_result() -> None:
    for name in ("create", "stream", "events", "content"):
        assert inspect.getdoc(getattr(Cosmos3Client, name))
        assert not inspect.iscoroutinefunction(getattr(Cosmos3Client, name))
    names = ("create", "list_all", "events", "content")
    returned = [inspect.signature(getattr(Cosmos3Client, name)).return_annotation for name in names]
    assert returned == ["Video", "BlockingIterator", "BlockingIterator", "BlockingIterator"]


# Unary calls


def test_a_video_is_created_from_the_request(client: Any, app: App) -> None:
    video = client.create(REQUEST, idempotency_key="once", service_class="batch", previews=3, request_id="mine")
    assert isinstance(video, Video)
    assert (video.status, video.progress, video.prompt, video.size) == ("queued", 0, "A red car.", "96x64")
    assert (video.service_class, video.notes, video.error, video.has_file) == ("batch", ("a note",), None, False)
    ((request, options),) = app.submitted
    assert request == {"prompt": "A red car."}
    sent = {name: options[name] for name in ("request_id", "idempotency_key", "service_class", "previews")}
    assert sent == {"request_id": "mine", "idempotency_key": "once", "service_class": "batch", "previews": 3}
    client.create(REQUEST)
    asked = app.submitted[1][1]
    assert (asked["request_id"], asked["idempotency_key"], asked["previews"]) == (None, None, 0)


@pytest.mark.parametrize("previews", [-1, 33, True, 2.0, "4", None])
def test_a_wrong_number_of_previews_is_refused_locally(previews: Any, client: Any, app: App) -> None:
    for call in (client.create, client.stream):
        with pytest.raises(RequestError, match="previews must be a whole number from 0 to 32"):
            call(REQUEST, previews=previews)
    assert app.calls == 0


def test_media_are_read_on_the_clients_machine(client: Any, app: App, tmp_path: Path) -> None:
    for call in (client.create, client.stream, client.generate):
        with pytest.raises(RequestError, match="image must be "):
            call(GenerationRequest(prompt="a", image=tmp_path / "none.png"))
    assert app.calls == 0


def test_a_video_is_retrieved_listed_and_deleted(client: Any, app: App) -> None:
    ids = [client.create(REQUEST).id for _ in range(5)]
    assert client.retrieve(ids[2]).id == ids[2]
    page = client.list(limit=2)
    assert ([video.id for video in page.videos], page.has_more) == ([ids[4], ids[3]], True)
    page = client.list(ids[1], limit=20, order="desc")
    assert ([video.id for video in page.videos], page.has_more) == ([ids[0]], False)
    assert [video.id for video in client.list(limit=3, order="asc").videos] == ids[:3]
    assert [video.id for video in client.list_all(order="asc")] == ids
    client.delete(ids[2])
    for call in (client.retrieve, client.cancel, client.delete, client.wait):
        with pytest.raises(NotFound):
            call(ids[2])
    for items in (client.events(ids[2]), client.content(ids[2])):
        with pytest.raises(NotFound):
            next(items)
    assert len(client.list().videos) == 4
    with pytest.raises(RequestError, match="after must be .*got 'nobodys'"):
        client.list("nobodys")
    with pytest.raises(RequestError, match="order must be "):
        client.list(order="up")
    with pytest.raises(RequestError, match="limit must be "):
        client.list(limit=0)


def test_videos_are_listed_in_pages(client: Any, app: App) -> None:
    for number in range(230):
        app.begin(str(number), {})
    assert [video.prompt for video in client.list_all(order="asc")] == [str(number) for number in range(230)]


@pytest.mark.parametrize("video_id", ["", "..", "a/b", "a?b", "a b", "ä", "x" * 200, "../../v1/models"])
def test_an_invalid_id_is_refused_locally(video_id: str, client: Any, app: App) -> None:
    for call in (client.retrieve, client.cancel, client.delete, client.wait):
        with pytest.raises(NotFound):
            call(video_id)
    with pytest.raises(NotFound):
        next(client.content(video_id))
    assert app.calls == 0


def test_a_video_is_cancelled(client: Any, app: App) -> None:
    video = client.cancel(client.create(REQUEST).id)
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("cancelled", "cancelled by its owner")
    assert video.has_ended


def test_a_video_is_remixed(client: Any, app: App) -> None:
    first = client.create(REQUEST)
    again = client.remix(first.id, "A blue car.", idempotency_key="k", request_id="mine")
    assert (again.prompt, again.remixed_from_video_id) == ("A blue car.", first.id)
    assert (app.submitted[1][1]["idempotency_key"], app.submitted[1][1]["request_id"]) == ("k", "mine")
    with pytest.raises(NotFound):
        client.remix("video_gen_0", "a")


def test_the_models_are_listed(client: Any) -> None:
    (model,) = client.models()
    assert (model.id, model.family, model.variant) == ("tiny", "cosmos3", "nano")
    assert model.modes == ("a", "b")


def test_generated_actions_are_arrays(client: Any, app: App) -> None:
    video = client.create(REQUEST)
    assert video.actions is None
    actions = GeneratedActions(np.array([[0.5, 2.0]], np.float32), "av", 1, False)
    app.videos[video.id]["action"] = {**actions.as_json(), "action_mode": "policy"}
    saved = client.retrieve(video.id).actions
    assert saved is not None
    assert np.array_equal(saved.values, actions.values)
    assert (saved.domain_name, saved.is_normalised) == ("av", False)


# Events


def without_numbers(events: list[VideoEvent]) -> list[tuple[type, dict[str, Any]]]:
    held = [{name: value for name, value in vars(event).items() if name not in ("seq", "data")} for event in events]
    return [(type(event), values) for event, values in zip(events, held, strict=True)]


def test_events_are_equal_over_both_transports(client: Any, app: App) -> None:
    video = client.create(REQUEST)
    events = list(client.events(video.id))
    assert [type(event) for event in events] == [
        QueuePosition,
        StepDone,
        PreviewReady,
        StepDone,
        FileStarted,
        StageRetried,
        ChunkEncoded,
        VideoEnded,
    ]
    assert [event.seq for event in events] == [None, 1, 2, 3, 4, 5, 6, 7]
    queued, step, preview, _, begun, retried, decoding, ended = events
    assert (queued.position, queued.eta_s) == (1, None)
    assert (step.step, step.num_steps, step.sigma, step.step_s, step.pid) == (1, 2, 0.5, 0.25, 7)
    assert (preview.step, preview.media_type, preview.image) == (1, "image/webp", b"webp")
    assert (begun.media_type, retried.stage, decoding.num_frames) == ("video/mp4", "decode", 9)
    assert ended.video == client.retrieve(video.id)
    assert (ended.video.status, ended.video.progress, ended.video.frames_sha256) == ("completed", 100, "f00d")
    with client.stream(REQUEST) as stream:
        streamed = list(stream)
    assert without_numbers(streamed)[:-1] == without_numbers(events)[:-1]
    assert streamed[-1].video.id == stream.video_id


def test_every_event_has_its_kind(client: Any, app: App) -> None:
    app.story = [
        ("started", {"attempt": 2}),
        ("previews_off", {"reason": "no memory", "more": 1}),
        ("song", {"of": "a later version"}),
        ("completed", {}),
    ]
    started, off, song, ended = client.events(client.create(REQUEST).id)
    assert (type(started), started.attempt) == (JobStarted, 2)
    assert (type(off), off.reason, off.data["more"]) == (PreviewsOff, "no memory", 1)
    assert (type(song), song.kind, song.data) == (OtherEvent, "song", {"of": "a later version"})
    assert ended.kind == "completed"


def test_events_can_be_followed_from_a_number(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    assert [event.seq for event in client.events(video_id, 5)] == [None, 6, 7]
    assert app.followed == [5]
    app.stories[video_id] = app.stories[video_id][1:]
    assert list(client.events(video_id, 7)) == [], "there is none after the last one"


def test_a_broken_connection_is_resumed_without_gaps_or_repeats(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    app.break_after = [3, 0, 2, None]
    assert [event.seq for event in client.events(video_id) if event.seq] == [1, 2, 3, 4, 5, 6, 7]
    assert app.followed == [0, 2, 2, 3]


def test_a_connection_that_ends_too_early_is_resumed(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    app.end_after = [3, 0, None]
    assert [event.seq for event in client.events(video_id) if event.seq] == [1, 2, 3, 4, 5, 6, 7]
    assert app.followed == [0, 2, 2]


@pytest.mark.parametrize("held_s", [0.0, 60.0])
def test_a_connection_that_lasted_is_no_failed_try(
    held_s: float, client: Any, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some proxies end every connection after a minute: a follower of a quiet video must not give up there."""
    monkeypatch.setattr(transport, "_HELD_S", held_s)
    video_id = client.create(REQUEST).id
    app.break_after = [*[0] * (2 * Patience().max_reconnects), None]
    if held_s:
        with pytest.raises(UnreachableError):
            client.wait(video_id)
    else:
        assert client.wait(video_id).status == "completed"


def test_a_follower_waits_for_a_restarting_app(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    app.next_errors = [ShuttingDown(0.0), OverloadedError("followers", 1, 0.0), StageFailed("director", 1, "died")]
    assert client.wait(video_id).status == "completed"
    assert app.calls >= 5


def test_a_follower_honours_retry_after(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    app.next_errors = [ShuttingDown(60.0)]
    with pytest.raises(DeadlineExceeded):
        list(client.events(video_id, timeout_s=0.3))
    assert app.followed == []


@pytest.mark.parametrize(("asked_s", "least_s", "most_s"), [(0.0, 1.5, 2.0), (0.1, 1.5, 2.0), (60.0, 60.0, 66.0)])
def test_pauses_grow_and_honour_retry_after(asked_s: float, least_s: float, most_s: float) -> None:
    pauses = [Patience(first_pause_s=1.0, max_pause_s=8.0).pause_s(2, asked_s) for _ in range(100)]
    assert least_s <= min(pauses) <= max(pauses) <= most_s


def test_repeated_events_are_dropped(client: Any, app: App) -> None:
    """The app ignores the event number that the follower sends."""
    video_id = client.create(REQUEST).id
    iterate_events = app.iterate_events
    app.iterate_events = lambda video_id, after: iterate_events(video_id, 0)  # type: ignore[method-assign]
    app.break_after = [4]
    assert [event.seq for event in client.events(video_id) if event.seq] == [1, 2, 3, 4, 5, 6, 7]


def test_a_follower_gives_up_after_its_timeout(client: Any, app: App) -> None:
    video_id = client.create(REQUEST).id
    app.break_after = [0] * 100
    with pytest.raises(UnreachableError):
        list(client.events(video_id))
    assert len(app.followed) == 9
    assert app.stopped == []


@pytest.mark.parametrize("way_out", ["event", "end"])
def test_following_a_deleted_video_raises(way_out: str, client: Any, app: App) -> None:
    app.story = [STORY[1], ("deleted", {}) if way_out == "event" else WAIT, *STORY[2:]]
    video_id = client.create(REQUEST).id
    app.end_after = [None if way_out == "event" else 1]
    events = client.events(video_id)
    assert next(events).seq == 1
    app.may_go_on = True
    if way_out == "end":
        del app.videos[video_id]
    with pytest.raises(NotFound):
        next(events)


def test_a_malformed_event_is_an_error(client: Any, app: App) -> None:
    app.story = [("step", {"step": "first"})]
    with pytest.raises(AnswerError, match="sends the event 'step', but not as this API does"):
        list(client.events(client.create(REQUEST).id))


# Waiting


def test_wait_returns_or_raises_the_end(client: Any, app: App) -> None:
    app.story = [WAIT, *STORY]
    video_id = client.create(REQUEST).id
    with pytest.raises(DeadlineExceeded, match="not done within 0 s"):
        client.wait(video_id, timeout_s=0.05)
    assert app.stopped == [], "waiting is all that ended"
    app.may_go_on = True
    assert client.wait(video_id).status == "completed"
    app.story = [("failed", {"code": "stage_failed", "message": "the stage 'decode' failed"})]
    video = client.wait(client.create(REQUEST).id)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "stage_failed"


# Files


def test_a_file_is_read_in_parts(client: Any, app: App, tmp_path: Path) -> None:
    video_id = client.generate(REQUEST).video.id
    parts = list(client.content(video_id))
    assert b"".join(parts) == app.file
    assert list(client.content(video_id, "thumbnail")) == [b"thumbnail"]
    assert client.save(video_id, tmp_path / "a.mp4") == tmp_path / "a.mp4"
    client.save(video_id, str(tmp_path / "a.webp"), "thumbnail")
    assert (tmp_path / "a.mp4").read_bytes() == app.file
    assert (tmp_path / "a.webp").read_bytes() == b"thumbnail"
    with pytest.raises(RequestError, match="existing directory"):
        client.save(video_id, tmp_path / "no" / "a.mp4")
    with pytest.raises(MediaError, match="cannot be written"):
        client.save(video_id, tmp_path / ("a" * 250))
    app.file = None
    with pytest.raises(NotFound):
        client.save(video_id, tmp_path / "b.mp4")
    queued = client.create(REQUEST).id
    with pytest.raises(NotReady, match="yet"):
        client.save(queued, tmp_path / "b.mp4")
    client.cancel(queued)
    with pytest.raises(NotFound, match="has failed or was cancelled"):
        client.save(queued, tmp_path / "b.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.webp"]


def test_a_truncated_file_is_not_saved(client: Any, app: App, tmp_path: Path) -> None:
    app.file = b"x" * 3_000_000
    video_id = client.generate(REQUEST).video.id
    for save in (lambda: client.save(video_id, tmp_path / "a.mp4"), lambda: list(client.content(video_id))):
        app.break_file_after = 2_000_000
        with pytest.raises(UnreachableError, match="broke off"):
            save()
    assert list(tmp_path.iterdir()) == []
    with client.content(video_id) as parts:
        next(parts)


# Generate and wait


def test_generate_returns_the_whole_result(client: Any, app: App) -> None:
    generated = client.generate(REQUEST, service_class="batch", request_id="mine")
    assert generated.media == app.file
    assert (generated.video.status, generated.video.stage_durations) == ("completed", {"total": 1.5})
    assert (app.submitted[0][1]["service_class"], app.submitted[0][1]["request_id"]) == ("batch", "mine")
    assert app.stopped == []
    app.media_type, app.file = None, None
    assert client.generate(REQUEST).media == b""


def test_repr_does_not_show_the_file(client: Any) -> None:
    assert len(repr(client.generate(REQUEST))) < 2000


FAILED = {"code": "deadline_exceeded", "message": str(DeadlineExceeded("denoise", 60.0))}


def test_a_failed_video_raises_its_error(client: Any, app: App) -> None:
    app.story = [*STORY[:2], ("failed", FAILED)]
    for call in (lambda: client.generate(REQUEST), lambda: list(client.stream(REQUEST))):
        with pytest.raises(DeadlineExceeded, match="was not done within 60 s; it was in the stage 'denoise'"):
            call()
    app.story = [*STORY[:2], ("cancelled", {})]
    with pytest.raises(JobCancelled, match="was stopped before its end: cancelled by its owner"):
        client.generate(REQUEST)
    assert app.stopped == [], "what has ended is left alone"


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_interrupting_generate_stops_the_work(call: str, client: Any, app: App) -> None:
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    with pytest.raises(DeadlineExceeded):
        list(getattr(client, call)(REQUEST, timeout_s=0.2))
    assert len(app.stopped) == 1


@pytest.mark.parametrize("how", ["close", "close at once", "leave", "break off", "drop", "drop at once"])
def test_leaving_a_stream_stops_the_work(how: str, client: Any, app: App) -> None:
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    stream = client.stream(REQUEST)
    if "at once" not in how:
        assert next(stream).kind == "queued"
    assert app.stopped == []
    if how.startswith("close"):
        stream.close()
        assert list(stream) == []
    elif how == "leave":
        with pytest.raises(ZeroDivisionError), stream:
            next(stream)
            raise ZeroDivisionError
    elif how == "break off":
        for event in stream:
            if event.kind == "step":
                break
        del event, stream
    else:
        del stream
    if how.startswith(("break off", "drop")):
        assert eventually(lambda: app.stopped or _turn(client))
    assert len(app.stopped) == 1


def _turn(client: Any) -> bool:
    """Run the client's event loop for a moment, if it runs only during calls."""
    if isinstance(client, InLoop):
        client.models()
    return False


def test_closing_an_ended_stream_stops_nothing(client: Any, app: App) -> None:
    with client.stream(REQUEST) as stream:
        assert [type(event) for event in stream][-1] is VideoEnded
        assert list(stream) == []
    stream.close()
    del stream
    client.models()
    assert app.stopped == []


def test_leaving_events_leaves_the_video_running(client: Any, app: App) -> None:
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    video_id = client.create(REQUEST).id
    events = client.events(video_id)
    next(events)
    assert app.num_closed == 0
    events.close()
    assert (app.num_closed, app.stopped) == (1, [])


# Errors


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RequestError("height", 100, "a multiple of 16", "Nearest are 96 and 112."), RequestError),
        (CapabilityError("lora", "x", "nothing", "It is not offered."), CapabilityError),
        (OverloadedError("jobs that wait", 256, 12.0), OverloadedError),
        (ShuttingDown(30.0), ShuttingDown),
        (DeadlineExceeded("decode", 60.0), DeadlineExceeded),
        (StageFailed("encode", 3, "died"), StageFailed),
        (OutOfMemory("of 1 GiB"), OutOfMemory),
        (IdempotencyConflict("once"), IdempotencyConflict),
        (ContentBlocked("prompt"), ContentBlocked),
        (GuardrailUnavailable("prompt"), Unavailable),
        (GangFailed("step", "died", 2), Unavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_are_equal_over_both_transports(
    raised: Exception, expected: type[Exception], client: Any, app: App
) -> None:
    calls = {
        "create": lambda: client.create(REQUEST, idempotency_key="once"),
        "stream": lambda: client.stream(REQUEST),
        "generate": lambda: client.generate(REQUEST),
    }
    for call in list(calls)[: 1 if expected is IdempotencyConflict else None]:
        app.next_errors = [raised]
        with pytest.raises(expected) as caught:
            calls[call]()
        # Why a process died is in the server's log; only callers inside the cluster see it.
        is_hidden = isinstance(raised, StageFailed | GangFailed) and "server's log" in str(caught.value)
        assert is_hidden or str(caught.value) == str(raised)
        for name in ("retry_after_s", "field", "given", "allowed", "hint"):
            if hasattr(raised, name):
                assert getattr(caught.value, name) == getattr(raised, name)


def test_an_internal_error_is_an_app_error(client: Any, app: App) -> None:
    app.next_errors = [ZeroDivisionError("a secret")]
    with pytest.raises(AnswerError) as caught:
        client.models()
    assert (caught.value.status, caught.value.code) == (500, "internal_error")
    app.next_errors = [JobsError("/a/secret/place is locked")]
    with pytest.raises(Unavailable, match="the database of jobs cannot be used just now") as away:
        client.models()
    assert "secret" not in str(away.value)


def test_calls_are_not_retried_by_default(client: Any, app: App) -> None:
    app.next_errors = [OverloadedError("jobs", 1, 0.0)]
    with pytest.raises(OverloadedError):
        client.create(REQUEST)
    assert app.calls == 1


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_retries_honour_retry_after(kind: str, transport: str, app: App) -> None:
    connected = connect_to(app, transport, Patience(max_wait_s=5.0, first_pause_s=0.001))
    client: Any = Cosmos3Client(connected) if kind == "blocking" else InLoop(connected)
    app.next_errors = [OverloadedError("jobs", 1, 0.0), ShuttingDown(0.0), GangFailed("load", "begins")]
    with pytest.raises(Unavailable):  # Retry-After is 5 s, and part of it has passed
        client.create(REQUEST)
    app.next_errors = [OverloadedError("jobs", 1, 0.0), ShuttingDown(0.0)]
    assert client.create(REQUEST).status == "queued"
    app.next_errors = [OverloadedError("jobs", 1, 60.0)]
    calls = app.calls
    with pytest.raises(OverloadedError) as caught:
        client.create(REQUEST)
    assert (caught.value.retry_after_s, app.calls) == (60.0, calls + 1)
    client.close()


def test_retries_end_at_the_callers_deadline(transport: str, app: App) -> None:
    with Cosmos3Client(connect_to(app, transport, Patience(max_wait_s=600.0))) as client:
        app.next_errors = [OverloadedError("jobs", 1, 5.0)]
        with pytest.raises(OverloadedError):
            client.generate(REQUEST, timeout_s=2.0)
    assert app.submitted == []


def test_base64_matches_the_double() -> None:
    assert base64.b64decode(str(STORY[2][1]["b64_json"])) == b"webp"
