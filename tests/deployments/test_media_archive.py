"""The archive of a media store: nodes without a shared directory find, read and remove files; outages."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from starlette.datastructures import Headers

from cosmos3_core.errors import MediaError
from deployments.api.content import read_finished, read_live
from deployments.config import MediaConfig
from deployments.errors import MediaStoreError
from deployments.jobs.job import new_job_id
from deployments.media import fsspec_objects
from deployments.media import layout as media_layout
from deployments.media import store as media_store
from deployments.media.fsspec_objects import FsspecObjects, open_objects
from deployments.media.job_files import JobFiles
from deployments.media.layout import DONE, FAILED, WRITING, MediaRecord, find_record, new_media_id
from deployments.media.objects import DirectoryObjects
from deployments.media.store import MediaStore
from tests.api.content_answers import Answer, content_answer, send_answer
from tests.deployments.clips import DATA, begin, make, read, sweep
from tests.settling import run

KEEP_S = 100.0
DEADLINE_S = 60.0
LONG = os.urandom(1 << 20) * 3 + b"end"


class FlakyObjects(MemoryFileSystem):
    """Objects in memory that fail on demand and count calls."""

    protocol = "flaky"
    calls: list[tuple[str, str]] = []  # noqa: RUF012 - of all instances, which are one a thread
    failing: Callable[[str, str], bool] = staticmethod(lambda verb, name: False)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _note(self, verb: str, path: str) -> None:
        name = path.rpartition("/")[2]
        self.calls.append((verb, name))
        if FlakyObjects.failing(verb, name):
            raise TimeoutError("no answer from someone:secret@host")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._note("get", path)
        return super().cat_file(path, start, end, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._note("put", path)
        super().pipe_file(path, value, mode, **options)

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        self._note("put", rpath)
        super().put_file(lpath, rpath, *arguments, **options)

    def ls(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._note("list", path)
        return super().ls(path, *arguments, **options)

    def rm_file(self, path: str) -> None:
        self._note("remove", path)
        super().rm_file(path)

    def rm(self, path: str, *arguments: Any, **options: Any) -> None:
        self._note("remove", path)
        super().rm(path, *arguments, **options)


@pytest.fixture(autouse=True)
def archives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("flaky", FlakyObjects, clobber=True)
    monkeypatch.setattr(fsspec_objects, "_PAUSES_S", (0.0, 0.0))
    FlakyObjects.calls.clear()
    FlakyObjects.failing = staticmethod(lambda verb, name: False)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["objects", "directory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return f"file://{tmp_path}/archive"
    return f"flaky://someone:secret@{uuid.uuid4().hex}/prefix"


class Nodes:
    """Two stores without a shared directory."""

    def __init__(self, directory: Path, url: str) -> None:
        self.one, self.other = (MediaStore(directory / name, 1 << 30, KEEP_S, url) for name in ("one", "other"))
        self.raw = fsspec.url_to_fs(url)[0]
        self.root = fsspec.url_to_fs(url)[1]

    def path(self, *names: str) -> str:
        return "/".join([self.root, *names])

    def list_archive(self) -> list[str]:
        found = self.raw.find(self.root) if self.raw.exists(self.root) else []
        return sorted(path.removeprefix(f"{self.root}/") for path in found)


@pytest.fixture
def nodes(tmp_path: Path, url: str) -> Nodes:
    return Nodes(tmp_path, url)


@pytest.fixture
def objects(tmp_path: Path) -> Nodes:
    """The archive's objects, which can be made to fail."""
    return Nodes(tmp_path, f"flaky://someone:secret@{uuid.uuid4().hex}/prefix")


def fail_next(*, verb: str = "", name: str = "", times: int = 1_000_000) -> None:
    """Make the next calls fail; all methods by default."""
    left = times

    def is_failing(called_verb: str, called_name: str) -> bool:
        nonlocal left
        if left and (not verb or verb == called_verb) and (not name or name == called_name):
            left -= 1
            return True
        return False

    FlakyObjects.failing = staticmethod(is_failing)


def heal() -> None:
    FlakyObjects.failing = staticmethod(lambda verb, name: False)


def fetch(store: MediaStore, media_id: str, **headers: str) -> Answer:
    """Return the HTTP answer."""

    async def ask() -> Answer:
        return await send_answer(await content_answer(store, media_id, "GET", Headers(headers)))

    return run(ask())


def test_a_clip_is_read_on_another_node(nodes: Nodes) -> None:
    media_id, entry = begin(nodes.one)
    record = nodes.other.require(media_id)
    assert (record.state, record.live_name) == (WRITING, ""), "what grows cannot be seen"
    assert nodes.one.require(media_id).live_name == "live.mp4"
    entry.path.write_bytes(DATA)
    assert nodes.other.require(media_id).state == WRITING
    done = entry.finish()
    assert nodes.other.require(media_id) == nodes.one.require(media_id) == done
    assert done.state == DONE
    assert read(nodes.other, media_id) == DATA
    assert read(nodes.other, media_id, 10, 5) == DATA[10:15]
    assert read(nodes.other, media_id, len(DATA)) == read(nodes.other, media_id, 5, 0) == b""
    assert read(nodes.other, media_id, len(DATA) - 1, 100) == DATA[-1:]
    assert os.listdir(nodes.other.directory) == [], "it is not copied"
    assert nodes.list_archive() == [f"{media_id}/{name}" for name in ("begun.json", "clip.mp4", "ended.json")]


def test_a_new_machine_finds_archived_clips(nodes: Nodes, tmp_path: Path, url: str) -> None:
    media_id = make(nodes.one)
    shutil.rmtree(nodes.one.directory)
    again = MediaStore.of(MediaConfig(directory=nodes.one.directory, max_bytes=1 << 30, keep_s=KEEP_S, archive=url))
    assert read(again, media_id) == DATA
    answer = fetch(again, media_id)
    assert (answer.status, answer.body) == (200, DATA)


def test_files_lost_from_the_directory_are_read_from_the_archive(nodes: Nodes) -> None:
    media_id = make(nodes.one, LONG)
    small = MediaStore(nodes.one.directory, 1, KEEP_S)
    assert sweep(small) == 1
    assert small.find(media_id) is None
    assert read(nodes.one, media_id) == LONG


def test_http_serves_whole_files_and_ranges_from_the_archive(nodes: Nodes) -> None:
    media_id = make(nodes.one, LONG)
    here, there = (fetch(store, media_id) for store in (nodes.one, nodes.other))
    assert here == there
    assert (there.status, there.body) == (200, LONG)
    for given, start, end in (
        ("bytes=5-9", 5, 10),
        ("bytes=1048570-2097160", 1048570, 2097161),
        ("bytes=-7", -7, None),
    ):
        answer = fetch(nodes.other, media_id, range=given)
        assert (answer.status, answer.body) == (206, LONG[start:end])
        assert answer.headers["content-range"].endswith(f"/{len(LONG)}")
    assert fetch(nodes.other, media_id, **{"if-none-match": there.headers["etag"]}).status == 304
    assert fetch(nodes.other, media_id, range=f"bytes={len(LONG)}-").status == 416


def test_a_clip_that_grows_on_another_node_is_not_ready(nodes: Nodes) -> None:
    media_id, _ = begin(nodes.one)
    answer = fetch(nodes.other, media_id)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (409, "media_not_ready", "1")
    nodes.one.fail(media_id, "why")
    answer = fetch(nodes.other, media_id)
    assert (answer.status, answer.code) == (410, "media_failed")


def test_a_follower_of_a_clip_on_another_node_gets_it_when_complete(nodes: Nodes) -> None:
    media_id, entry = begin(nodes.one)
    entry.path.write_bytes(DATA)
    record = nodes.other.require(media_id)

    async def follow() -> bytes:
        async def parts() -> list[bytes]:
            return [part async for part in read_live(nodes.other, record)]

        async with asyncio.timeout(DEADLINE_S):
            following = asyncio.create_task(parts())
            await asyncio.sleep(0.1)
            assert not following.done()
            await asyncio.to_thread(entry.finish)
            return b"".join(await following)

    assert asyncio.run(follow()) == DATA


def test_a_failure_is_known_on_every_node(nodes: Nodes) -> None:
    for sayer in (nodes.one, nodes.other):
        media_id, entry = begin(nodes.one)
        entry.path.write_bytes(DATA)
        sayer.fail(media_id, "the encoder died")
        for store in (sayer, nodes.other):
            record = store.require(media_id)
            assert (record.state, record.reason) == (FAILED, "the encoder died")
        with pytest.raises(MediaError, match="was declared failed while it was written"):
            entry.finish()
        assert nodes.list_archive() == []


def test_a_completed_clip_cannot_fail(nodes: Nodes) -> None:
    media_id = make(nodes.one)
    nodes.other.fail(media_id, "too late")
    nodes.one.fail(media_id, "too late")
    assert nodes.one.require(media_id).state == nodes.other.require(media_id).state == DONE


def test_removing_a_clip_removes_it_from_the_archive(nodes: Nodes) -> None:
    for remover in (nodes.one, nodes.other):
        media_id, kept = make(nodes.one), make(nodes.one)
        remover.remove(media_id)
        remover.remove(media_id)
        assert nodes.other.find(media_id) is None
        assert [name for name in nodes.list_archive() if media_id in name] == []
        assert read(nodes.other, kept) == DATA
    assert len(os.listdir(nodes.one.directory)) == 3, "what only the other node knew of"


@pytest.mark.parametrize("remover", ["one", "other"])
def test_a_clip_removed_while_it_is_written_stays_removed(nodes: Nodes, remover: str) -> None:
    media_id, entry = begin(nodes.one)
    entry.path.write_bytes(DATA)
    getattr(nodes, remover).remove(media_id)
    with pytest.raises(MediaError, match="is not in the media store"):
        entry.finish()
    assert nodes.list_archive() == []
    assert nodes.other.find(media_id) is None


def test_nodes_must_share_one_archive(nodes: Nodes, tmp_path: Path) -> None:
    elsewhere = MediaStore(tmp_path / "elsewhere", 1, 1, f"flaky://someone:secret@{uuid.uuid4().hex}")
    with pytest.raises(MediaStoreError, match="nor in flaky://.*: all nodes need the same media.archive") as raised:
        elsewhere.require(make(nodes.one))
    assert "secret" not in str(raised.value)


JOB = f"video_gen_{'0' * 32}"


@pytest.mark.parametrize("media_id", ["", "..", JOB, f"{JOB}/..", "0" * 32, f"{JOB}/{'A' * 32}", None, 5])
def test_an_invalid_id_is_never_looked_up(objects: Nodes, media_id: Any) -> None:
    FlakyObjects.calls.clear()
    assert objects.one.find(media_id) is None
    objects.one.fail(media_id, "why")
    objects.one.remove(media_id)
    with pytest.raises(MediaStoreError):
        objects.one.require(media_id)
    assert FlakyObjects.calls == []


def test_a_large_file_is_read_in_blocks(objects: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read from the start or an offset never takes the whole file at once."""
    media_id = make(objects.one, LONG)
    sizes: list[int] = []
    cat = MemoryFileSystem.cat_file

    def count(*arguments: Any, **options: Any) -> bytes:
        sizes.append(len(data := cat(*arguments, **options)))
        return data

    record = objects.other.require(media_id)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)

    async def read() -> bytes:
        return b"".join([part async for part in read_finished(objects.other, record)])

    assert asyncio.run(read()) == LONG
    assert max(sizes) <= 1 << 20
    assert len(sizes) <= 5
    sizes.clear()
    with objects.other.open(record) as file:
        assert file.seek(-10, io.SEEK_END) == len(LONG) - 10
        assert file.read(5) == LONG[-10:-5]
        assert file.seek(2, io.SEEK_CUR) == file.tell() == len(LONG) - 3
        assert file.read() == b"end"
        file.seek(len(LONG) + 50)
        assert file.read(1) == b""
    assert sum(sizes) < 100


# When the archive fails


def test_a_clip_is_not_complete_until_its_file_is_archived(objects: Nodes) -> None:
    for name in ("clip.mp4", "ended.json"):
        media_id, entry = begin(objects.one)
        entry.path.write_bytes(DATA)
        fail_next(verb="put", name=name)
        with pytest.raises(MediaError, match=r"is not in the media store: flaky://\*\*\*@") as raised:
            entry.finish()
        assert "secret" not in str(raised.value)
        heal()
        assert objects.one.require(media_id).state == WRITING
        assert objects.other.find(media_id) is None, "no half of it is left"
        objects.one.fail(media_id, "the archive failed")
        assert objects.one.require(media_id).state == FAILED


@pytest.mark.parametrize("name", ["clip.mp4", "ended.json", "begun.json"])
def test_an_archive_call_is_tried_three_times(objects: Nodes, name: str) -> None:
    fail_next(verb="put", name=name, times=2)
    media_id = make(objects.one)
    assert read(objects.other, media_id) == DATA
    assert FlakyObjects.calls.count(("put", name)) == 3


def test_a_clip_that_the_archive_refuses_is_not_started(objects: Nodes) -> None:
    fail_next(verb="put")
    media_id = new_media_id(new_job_id())
    with pytest.raises(MediaError, match=r"the media archive cannot take .*: flaky://\*\*\*@"):
        objects.one.create(media_id, "video/mp4", ".mp4", is_live=True)
    heal()
    assert objects.one.require(media_id).state == FAILED


def test_an_archive_outage_is_not_reported_as_expired(objects: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    media_id, local = make(objects.one), make(objects.other)
    fail_next()
    with pytest.raises(MediaError, match="cannot be looked up") as raised:
        objects.other.find(media_id)
    assert "secret" not in str(raised.value)
    with pytest.raises(MediaError, match="cannot be looked up"):
        fetch(objects.other, media_id)
    with pytest.raises(MediaError, match="cannot be removed"):
        objects.other.remove(media_id)
    objects.other.fail(media_id, "no second error")
    assert read(objects.other, local) == DATA, "what is in the directory is given"
    assert "secret" not in caplog.text
    heal()
    assert read(objects.other, media_id) == DATA


def test_an_archive_outage_while_reading_breaks_the_connection(objects: Nodes) -> None:
    record = objects.other.require(make(objects.one))
    fail_next(verb="get", name="clip.mp4")

    async def collect() -> bytes:
        return b"".join([part async for part in read_finished(objects.other, record)])

    with pytest.raises(OSError, match="TimeoutError"):
        asyncio.run(collect())
    with pytest.raises(MediaError, match="cannot be read"):
        read(objects.other, record.media_id)


@pytest.mark.parametrize("damaged", [b"", b"{", b"\0" * 50, b'{"media_id": "../../etc"}', b"[" * 50_000])
def test_a_damaged_record_counts_as_none(nodes: Nodes, damaged: bytes) -> None:
    """A killed writer may leave one where objects are files."""
    media_id, entry = begin(nodes.one)
    entry.path.write_bytes(DATA)
    nodes.raw.pipe_file(nodes.path(media_id, "ended.json"), damaged)
    assert nodes.other.require(media_id).state == WRITING
    nodes.raw.pipe_file(nodes.path(media_id, "begun.json"), damaged)
    assert nodes.other.find(media_id) is None


def test_a_record_of_another_id_counts_as_none(nodes: Nodes) -> None:
    one, other = make(nodes.one), make(nodes.one)
    nodes.raw.pipe_file(nodes.path(one, "ended.json"), nodes.raw.cat_file(nodes.path(other, "ended.json")))
    nodes.raw.pipe_file(nodes.path(one, "begun.json"), nodes.raw.cat_file(nodes.path(other, "begun.json")))
    assert nodes.other.find(one) is None
    assert read(nodes.other, other) == DATA


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/a/directory", "/a/directory is no place for files: a single URL is, such as s3://bucket/prefix"),
        ("nosuch://someone:secret@b/p", r"nosuch://\*\*\*@b/p cannot be opened"),
        ("s3://bucket/prefix", "s3:// needs a package that is not installed: .*s3fs"),
        (
            "flaky://someone:secret@fails/x",
            r"media.archive flaky://\*\*\*@fails/x cannot be used: .*TimeoutError",
        ),
        ("file:///proc/none", "media.archive /proc/none cannot be used: .*; check media.archive"),
    ],
)
def test_an_unusable_archive_is_refused_at_the_start(
    tmp_path: Path, url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fail_next()
    with pytest.raises(MediaStoreError, match=said) as raised:
        MediaStore.of(MediaConfig(directory=tmp_path, max_bytes=1, keep_s=1, archive=url))
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(MediaConfig(directory=tmp_path, max_bytes=1, keep_s=1, archive=url))


# Who records the end


def test_an_end_is_created_once(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it appears just after the last look, the second writer is refused and sees the first one's end."""
    assert nodes.one.archive is not None
    assert nodes.one.archive.has_atomic_create
    _, entry = begin(nodes.one)
    entry.path.write_bytes(DATA)

    def find_and_be_late(objects: Any, media_id: str) -> MediaRecord | None:
        record = find_record(objects, media_id)
        monkeypatch.undo()
        nodes.other.fail(media_id, "the encoder died")
        return record

    monkeypatch.setattr(media_layout, "find_record", find_and_be_late)
    with pytest.raises(MediaError, match="was declared failed while it was written"):
        entry.finish()
    assert nodes.list_archive() == [], "and what it put there is gone"


def test_a_directory_without_hard_links_creates_once_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = DirectoryObjects(tmp_path)

    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    objects.create("folder", "ended.json", b"first")
    with pytest.raises(FileExistsError):
        objects.create("folder", "ended.json", b"second")
    assert objects.read("folder", "ended.json") == b"first"
    assert os.listdir(tmp_path) == ["folder"]


def test_an_end_whose_answer_was_lost_is_recognised_as_ones_own(
    objects: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, is_lost = FlakyObjects.pipe_file, True

    def put_and_lose(self: FlakyObjects, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        nonlocal is_lost
        put(self, path, value, mode, **options)
        if path.endswith("ended.json") and is_lost:
            is_lost = False
            raise TimeoutError("no answer")

    monkeypatch.setattr(FlakyObjects, "pipe_file", put_and_lose)
    media_id = make(objects.one)
    assert not is_lost
    assert read(objects.other, media_id) == DATA


class LooksFirst(FlakyObjects):
    """Creates as fsspec's default does: checks, then writes."""

    protocol = "looksfirst"
    pipe_file = fsspec.AbstractFileSystem.pipe_file

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).replace("looksfirst://", "flaky://"))


def test_an_archive_that_cannot_create_once_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("looksfirst", LooksFirst, clobber=True)
    monkeypatch.setattr(media_store.logger, "propagate", True)
    caplog.set_level("WARNING", media_store.logger.name)
    store = MediaStore(tmp_path, 1 << 30, KEEP_S, "looksfirst://someone:secret@host/prefix")
    assert "looksfirst://***@host/prefix cannot create a record exactly once" in caplog.text
    assert store.archive is not None
    assert not store.archive.has_atomic_create
    media_id = make(store)
    store.fail(media_id, "too late")
    assert find_record(store.archive, media_id) == store.require(media_id)


@pytest.mark.parametrize(("has_mode", "has_atomic_create"), [(True, True), (False, False)])
def test_exclusive_creation_is_detected_by_pipe_files_mode(
    *, has_mode: bool, has_atomic_create: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like s3fs and gcsfs, which override it, and like file systems without a mode."""

    class WithMode:
        async_impl = True

        async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None: ...

    class Without:
        async_impl = True

        async def _pipe_file(self, path: str, data: bytes) -> None: ...

    monkeypatch.setattr(fsspec, "url_to_fs", lambda *_, **__: (WithMode() if has_mode else Without(), "b/p"))
    assert FsspecObjects("s3://b/p", "b/p").has_atomic_create is has_atomic_create


# Sweeping


def make_older(nodes: Nodes, media_id: str, seconds: float) -> None:
    for name in ("begun.json", "ended.json"):
        path = nodes.path(media_id, name)
        if nodes.raw.exists(path):
            record = json.loads(nodes.raw.cat_file(path))
            changed_s = record["updated_s"] - seconds
            nodes.raw.pipe_file(path, json.dumps(record | {"updated_s": changed_s}).encode())
            if nodes.raw.protocol[0] == "file":
                for changed in (Path(path), *list(Path(path).parents)[:2]):
                    os.utime(changed, (changed_s, changed_s))


def test_old_clips_are_swept_and_new_ones_kept(nodes: Nodes) -> None:
    old, new, failed, given_up = make(nodes.one), make(nodes.one), begin(nodes.one)[0], begin(nodes.one)[0]
    nodes.one.fail(failed, "why")
    for media_id, seconds in ((old, KEEP_S + 5), (new, KEEP_S - 50), (failed, KEEP_S + 5), (given_up, KEEP_S + 5)):
        make_older(nodes, media_id, seconds)
    nodes.raw.makedirs(nodes.path("mine"), exist_ok=True)
    nodes.raw.pipe_file(nodes.path("mine", "notes"), b"no clip")
    damaged = new_media_id(new_job_id())
    nodes.raw.makedirs(nodes.path(damaged), exist_ok=True)
    nodes.raw.pipe_file(nodes.path(damaged, "ended.json"), b"no record")
    staying = {"mine", damaged}  # an object store does not tell its age: it may be new
    if nodes.raw.protocol[0] == "file":
        for path in ((damaged, "ended.json"), (damaged,), (damaged.partition("/")[0],)):
            os.utime(nodes.path(*path), (1, 1))
        staying.remove(damaged)
    now_s = time.time()
    assert sweep(nodes.other, now_s) == 5 - len(staying)
    left = {name.rpartition("/")[0] for name in nodes.list_archive()}
    assert left == {new, *staying}
    assert sweep(nodes.other, now_s + 52) == 1
    assert {name.rpartition("/")[0] for name in nodes.list_archive()} == staying


def test_files_that_a_job_needs_are_kept_and_others_swept(nodes: Nodes) -> None:
    """The database decides, not the files' ages."""
    needed, expired, failed = (make(nodes.one) for _ in range(3))
    for media_id in (needed, expired, failed):
        make_older(nodes, media_id, 10 * KEEP_S)
    needs = {needed.partition("/")[0]: None, expired.partition("/")[0]: 0.0, failed.partition("/")[0]: 0.0}
    assert nodes.other.sweep(lambda _: needs, time.time()) == 2
    assert {name.rpartition("/")[0] for name in nodes.list_archive()} == {needed}


def test_the_archive_has_no_bound_of_bytes(nodes: Nodes, url: str) -> None:
    media_ids = [make(nodes.one) for _ in range(3)]
    assert MediaStore(nodes.one.directory, 1, KEEP_S, url).sweep(None, time.time()) == 3
    assert os.listdir(nodes.one.directory) == []
    assert all(read(nodes.one, media_id) == DATA for media_id in media_ids)


def test_the_archive_is_swept_seldom_without_reading_known_jobs(objects: Nodes) -> None:
    media_ids, now_s = [make(objects.one) for _ in range(3)], time.time()
    needs = {media_id.partition("/")[0]: KEEP_S for media_id in media_ids}
    FlakyObjects.calls.clear()
    assert objects.other.sweep(lambda _: needs, now_s) == 0
    assert FlakyObjects.calls == [("list", "prefix")]
    FlakyObjects.calls.clear()
    assert objects.other.sweep(lambda _: needs, now_s + KEEP_S / 200) == 0
    assert FlakyObjects.calls == []
    needs = dict.fromkeys(needs, 0.0)
    assert objects.other.sweep(lambda _: needs, now_s + 2 * KEEP_S) == len(media_ids)
    assert objects.list_archive() == []


def test_an_archive_outage_does_not_stop_the_directorys_sweep(objects: Nodes) -> None:
    make(objects.one)
    fail_next(verb="list")
    with pytest.raises(MediaError, match="the media store cannot be swept"):
        sweep(objects.one, time.time() + 2 * KEEP_S)
    assert os.listdir(objects.one.directory) == []
    heal()
    assert sweep(objects.one, time.time() + 2 * KEEP_S) == 1, "and the next one goes on"


def test_a_jobs_files_are_beside_its_clip(nodes: Nodes, url: str) -> None:
    media_id = make(nodes.one)
    files, job_id = JobFiles(open_objects(url)), media_id.partition("/")[0]
    files.put(job_id, "image", DATA)
    assert f"{job_id}/image" in nodes.list_archive()
    assert os.listdir(nodes.one.directory / job_id) == [media_id.partition("/")[2]], "they are in the archive alone"
    assert sweep(nodes.one, time.time() + 2 * KEEP_S) == 1, "out of the directory; files come before their job"
    assert read(nodes.other, media_id) == JobFiles(open_objects(url)).get(job_id, "image") == DATA
    files.remove(job_id)
    assert read(nodes.other, media_id) == DATA
    nodes.other.remove(media_id)
    assert nodes.list_archive() == []


def test_an_archived_record_has_the_same_content(nodes: Nodes) -> None:
    media_id = make(nodes.one)
    record = MediaRecord.of_json(nodes.raw.cat_file(nodes.path(media_id, "ended.json")), media_id.partition("/")[0])
    assert record == nodes.one.require(media_id)
