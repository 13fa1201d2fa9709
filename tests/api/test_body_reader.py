"""Reading bodies: bounded each and together, complete or refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

import pytest
from starlette.requests import Request

from cluster.errors import OverloadedError
from cosmos3_core.presets import LIMITS
from deployments import process_memory
from deployments.api import body_reader
from deployments.api.body_reader import MAX_FIELDS, MAX_URLENCODED_BYTES, MemoryBudget, read_fields
from deployments.errors import BodyError

JSON = "application/json"
MULTIPART = "multipart/form-data; boundary=x"
FORM = "application/x-www-form-urlencoded"
GONE = None


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--x\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


def request_of(kind: str, chunks: Iterable[bytes | None], length: int | str | None = None) -> Request:
    """Make a request whose body has these chunks; at :data:`GONE` the client disconnects."""
    headers = [(b"content-type", kind.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    messages: list[dict[str, Any]] = [
        {"type": "http.disconnect"} if chunk is GONE else {"type": "http.request", "body": chunk, "more_body": True}
        for chunk in chunks
    ]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(left)

    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def read(request: Request, max_bytes: int = 10_000, room: MemoryBudget | None = None) -> dict[str, Any]:
    room = room or MemoryBudget(1 << 30)
    before = room.taken_bytes
    with room.reserve() as held:
        try:
            return asyncio.run(read_fields(request, max_bytes, held))
        finally:
            assert room.taken_bytes - before == held.num_bytes


def test_every_content_type_gives_the_same_fields() -> None:
    assert read(request_of(JSON, [b'{"a": ', b'[1, "b"]}'])) == {"a": [1, "b"]}
    assert read(request_of(JSON + "; charset=UTF-8", [b"{}"])) == {}
    assert read(request_of(FORM, [b"a=1&b=", b"x%20y"])) == {"a": "1", "b": "x y"}
    body = part("a", "ä".encode()) + part("image", b"\0\xff" * 500, "a.png") + part("none", b"", "") + b"--x--\r\n"
    for size in (1, 7, len(body)):
        chunks = [body[start : start + size] for start in range(0, len(body), size)]
        assert read(request_of(MULTIPART, chunks)) == {"a": "ä", "image": b"\0\xff" * 500}


def test_a_large_file_is_spooled_and_complete() -> None:
    data = bytes(range(256)) * 20_000
    body = part("video", data, "v.mp4") + b"--x--\r\n"
    chunks = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    assert read(request_of(MULTIPART, chunks), 1 << 23) == {"video": data}


def test_a_body_of_just_the_bound_is_read() -> None:
    assert read(request_of(JSON, [b"{}" + b" " * 5998, b" " * 4000])) == {}


@pytest.mark.parametrize(
    ("kind", "chunks", "length", "status", "code"),
    [
        (JSON, [b"{}"], 10_001, 413, "body_too_large"),
        (JSON, [b"{}"], "9" * 5000, 413, "body_too_large"),
        (JSON, [b" " * 6000, b" " * 4001], None, 413, "body_too_large"),
        (MULTIPART, [part("image", b"0" * 6000, "a")] * 2, None, 413, "body_too_large"),
        (JSON, [b'{"a": 1, ', GONE], None, 400, "body_incomplete"),
        (MULTIPART, [part("image", b"0" * 100, "a")[:-50], GONE], None, 400, "body_incomplete"),
        (MULTIPART, [part("a", b"1") + part("a", b"1") + b"--x--"], None, 400, "broken_form"),
        (MULTIPART, [part("a", b"1") + part("a", b"1", "f") + b"--x--"], None, 400, "broken_form"),
        (MULTIPART, [part(f"f{i}", b"1", "f") for i in range(5)], None, 400, "broken_form"),
        (MULTIPART, [b"--y\r\nbroken"], None, 400, "broken_form"),
        ("multipart/form-data", [b"--x"], None, 400, "broken_form"),
        (FORM, [b"a=1&a=2"], None, 400, "broken_form"),
        (JSON, [b'{"a": 1, "a": 1}'], None, 400, "broken_json"),
        (JSON, [b'{"b": {"a": 1, "a": 2}}'], None, 400, "broken_json"),
        (JSON, [b"[" * 9000], None, 400, "broken_json"),
        (JSON, [b"[1]"], None, 400, "broken_json"),
        (JSON, [b"\xff\xfe"], None, 400, "broken_json"),
        (JSON, [], None, 400, "broken_json"),
        ("text/plain", [b"a"], None, 415, "wrong_content_type"),
        ("", [b"a"], None, 415, "wrong_content_type"),
        (MULTIPART + "; charset=punycode", [b"a"], None, 415, "wrong_content_type"),
    ],
)
def test_an_unreadable_body_is_refused(
    kind: str, chunks: list[bytes | None], length: Any, status: int, code: str
) -> None:
    with pytest.raises(BodyError) as caught:
        read(request_of(kind, chunks, length))
    assert (caught.value.status, caught.value.code) == (status, code)


def test_countless_small_values_are_refused_before_they_take_memory() -> None:
    body = b'{"actions": [' + b"[]," * 4_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(BodyError, match="more than the 1000000 values"):
            read(request_of(JSON, [body]), 1 << 24)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


def test_json_labelled_as_a_form_is_read() -> None:
    """curl -d sends it so."""
    with pytest.raises(BodyError, match="looks like JSON, which needs the header content-type: application/json"):
        read(request_of(FORM, [b'\n{"prompt": "a"}']))


def test_a_large_urlencoded_form_is_refused() -> None:
    async def never() -> dict[str, Any]:
        raise AssertionError("it was read")

    headers = [(b"content-type", FORM.encode()), (b"content-length", b"%d" % (MAX_URLENCODED_BYTES + 1))]
    with pytest.raises(BodyError, match=f"{MAX_URLENCODED_BYTES} bytes .* send multipart/form-data") as caught:
        read(Request({"type": "http", "headers": headers}, never), 1 << 24)
    assert caught.value.status == 413
    for piece in (b"%41", b"&", b"a=1&"):
        with pytest.raises(BodyError, match="send multipart/form-data") as caught:
            read(request_of(FORM, [b"a=", *[piece * 100_000] * 11]), 1 << 24)
        assert caught.value.status == 413
    with pytest.raises(BodyError, match="than the 1000 bytes that are allowed$"):
        read(request_of(FORM, [b"a=" + b"1" * 1000]), 1000)
    longest = "🦊" * LIMITS.max_prompt_chars
    assert read(request_of(FORM, [urlencode({"a": longest}).encode()]), 1 << 24) == {"a": longest}
    text = b"1" * MAX_URLENCODED_BYTES
    assert read(request_of(JSON, [b'{"a": "', text, b'"}']), 1 << 24)["a"] == text.decode()


def test_a_form_of_too_many_fields_is_refused() -> None:
    for count in (MAX_FIELDS, MAX_FIELDS + 1):
        forms = {
            FORM: b"&".join(b"a%d=" % index for index in range(count)),
            MULTIPART: b"".join(part(f"a{index}", b"") for index in range(count)) + b"--x--",
            JSON: json.dumps({f"a{index}": "" for index in range(count)}).encode(),
        }
        for kind, body in forms.items():
            if count > MAX_FIELDS:
                with pytest.raises(BodyError, match=str(MAX_FIELDS)):
                    read(request_of(kind, [body]), 1 << 20)
            else:
                assert len(read(request_of(kind, [body]), 1 << 20)) == MAX_FIELDS


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [(FORM, b"a=1", "_parse_urlencoded"), (JSON, b'{"a": 1}', "_parse_json")],
)
def test_bodies_are_parsed_in_threads(kind: str, body: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    work = getattr(body_reader, name)

    def note(data: bytearray) -> Any:
        threads.append(threading.current_thread())
        return work(data)

    monkeypatch.setattr(body_reader, name, note)
    assert read(request_of(kind, [body])).keys() == {"a"}
    assert threads
    assert threading.main_thread() not in threads


class Slow:
    """A client that sends each piece after a pause, by a fake clock, and repeats the last one.

    Args:
        pieces: of the body.
        pause_s: before each.
    """

    def __init__(self, pieces: list[bytes], pause_s: float) -> None:
        self._pieces, self._pause_s = pieces, pause_s
        self.num_sent, self.now_s = 0, 0.0

    def monotonic(self) -> float:
        return self.now_s

    @property
    def request(self) -> Request:
        return Request({"type": "http", "headers": [(b"content-type", JSON.encode())]}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        assert self.num_sent < 1000
        self.now_s += self._pause_s
        for _ in range(3):
            await asyncio.sleep(0)  # else no timeout fires
        self.num_sent += 1
        piece = self._pieces[min(self.num_sent, len(self._pieces)) - 1]
        return {"type": "http.request", "body": piece, "more_body": True}


@pytest.mark.parametrize("pieces", [[b" "], [b" " * (1 << 24), b" "]], ids=["from the start", "after a fast start"])
def test_a_trickling_body_times_out(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(pieces, 10.0)
    monkeypatch.setattr(body_reader, "time", slow)
    with pytest.raises(BodyError, match="30 s behind 65536 bytes a second") as caught:
        read(slow.request, 1 << 25)
    assert (caught.value.status, caught.value.code) == (408, "body_too_slow")
    assert slow.num_sent < 6


def test_a_slow_but_steady_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow([b" " * 700_000], 10.0)
    monkeypatch.setattr(body_reader, "time", slow)
    with pytest.raises(BodyError) as caught:
        read(slow.request, 1 << 25)
    assert (caught.value.status, slow.num_sent) == (413, 48)


@pytest.mark.parametrize("limit", ["_UPLOAD_S", "_MAX_LAG_S"])
def test_a_body_without_end_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, limit, 0.05)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    with pytest.raises(BodyError, match=r"0\.05 s") as caught:
        read(request)
    assert caught.value.status == 408


def test_bodies_beyond_the_shared_bound_are_refused_unread() -> None:
    room = MemoryBudget(1000)

    async def never() -> dict[str, Any]:
        raise AssertionError("it was read")

    headers = [(b"content-type", b"application/json"), (b"content-length", b"501")]
    unread = Request({"type": "http", "headers": headers}, never)
    with room.reserve() as other:
        other.grow_to(500)
        with pytest.raises(OverloadedError, match="bytes of bodies") as caught:
            read(unread, room=room)
        assert caught.value.retry_after_s > 0
        assert room.taken_bytes == 500
        # Without Content-Length the bound is met while reading.
        with pytest.raises(OverloadedError):
            read(request_of(JSON, [b" " * 300] * 2), room=room)
        assert read(request_of(JSON, [b" " * 300, b"{}"], 302), room=room) == {}
        assert room.taken_bytes == 500
    assert room.taken_bytes == 0


def test_room_is_released_however_reading_ends() -> None:
    room = MemoryBudget(1000)
    for chunks in ([b'{"a"', GONE], [b"x"], [b"{}"]):
        with contextlib.nullcontext() if chunks == [b"{}"] else pytest.raises(BodyError):
            read(request_of(JSON, chunks, 900), room=room)
        assert room.taken_bytes == 0
    with room.reserve() as held:
        held.grow_to(10)
        held.grow_to(5)
        held.grow_to(20)
        assert (held.num_bytes, room.taken_bytes) == (20, 20)


def test_an_announced_but_unsent_body_holds_no_room() -> None:
    room = MemoryBudget(1000)
    with room.reserve() as held:
        held.check(1000)
        assert room.taken_bytes == 0
        with pytest.raises(OverloadedError):
            held.check(1001)


@pytest.mark.parametrize(("num_bytes", "is_trimmed"), [(100_000, False), (2_000_000, True)])
def test_memory_of_large_bodies_is_given_back(
    num_bytes: int, is_trimmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(body_reader, "give_memory_back", lambda: calls.append(True))
    read(request_of(JSON, [b'{"a": "', b"a" * num_bytes, b'"}']), max_bytes=4_000_000)
    assert calls == [True] * is_trimmed


def test_memory_is_given_back_once_for_requests_that_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops all threads of the process for a moment."""
    trimmed = threading.Semaphore(0)
    with process_memory._is_due:  # the requests of earlier tests are done
        pass
    monkeypatch.setattr(process_memory, "_AFTER_S", 0.3)
    monkeypatch.setattr(process_memory, "_trim", trimmed.release)
    for _ in range(3):
        process_memory.give_memory_back()
    assert trimmed.acquire(timeout=30.0)
    process_memory.give_memory_back()
    assert trimmed.acquire(timeout=30.0)
    assert not trimmed.acquire(timeout=1.0)


def test_large_bodies_are_parsed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parsing, most_at_once = 0, 0

    def parse(data: bytearray) -> dict[str, Any]:
        nonlocal parsing, most_at_once
        parsing += 1
        most_at_once = max(most_at_once, parsing)
        time.sleep(0.05)
        parsing -= 1
        return {}

    async def read_all(budget: MemoryBudget) -> None:
        async def read_one() -> None:
            with budget.reserve() as reserved:
                await read_fields(request_of(JSON, [b" " * 2_000_000]), 4_000_000, reserved)

        await asyncio.gather(*(read_one() for _ in range(3)))

    monkeypatch.setattr(body_reader, "_parse_json", parse)
    asyncio.run(read_all(MemoryBudget(1 << 30)))
    assert most_at_once == 1


_LONG = "a" * 1_200_000


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "' + _LONG + '", "b": [1, "c", {"d": "' + _LONG + '"}]}',
        '{"a": "' + _LONG + '\\n\\u00e9\\"", "b": 2.5e3}',
        '{"a": "' + _LONG + "ä\N{GRINNING FACE}" + '",\n "b": true}',
        '{"a": "' + _LONG + '\n"}',
        '{"a": "' + _LONG + '", "a": 1}',
        '{"a": "' + _LONG,
        '{"a": "' + _LONG + '"} x',
        "[" * 200_000 + " " * 1_000_000,
        json.dumps([{"n": number, "text": "x"} for number in range(60_000)]),
    ],
    ids=["long", "escapes", "not ASCII", "control", "twice", "open", "more", "deep", "many"],
)
def test_large_texts_are_read_as_small_ones(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(text) > process_memory.LARGE_BYTES

    def outcome() -> object:
        try:
            return body_reader.read_json(text.encode())
        except ValueError as error:
            return str(error)

    found = outcome()
    monkeypatch.setattr(body_reader, "LARGE_BYTES", 1 << 30)
    assert found == outcome()
