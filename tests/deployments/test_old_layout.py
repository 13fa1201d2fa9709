"""The file layout of releases up to schema 0002: files of known jobs are moved, despite kills and full disks."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from deployments.errors import MediaStoreError
from deployments.jobs.job import new_job_id
from deployments.media import sweeper
from deployments.media.fsspec_objects import FsspecObjects
from deployments.media.job_files import JobFiles
from deployments.media.layout import DONE
from deployments.media.objects import DirectoryObjects
from deployments.media.old_layout import adopt_old_files, list_old_folders
from deployments.media.store import MediaStore
from tests.deployments.clips import read
from tests.failing_steps import act_at, is_killed_at

KEEP_S = 1e9
DATA = bytes(range(256)) * 5
# The archive's old paths; the directory's were the same.
NAMES = ("begun.json", "clip.mp4", "ended.json", "thumbnail.json", "thumbnail-0123456789abcdef.webp")


@dataclass
class OldStore:
    """A store in the old layout: one finished job with an input, one queued job, one job and one attempt that
    the database does not know.

    Attributes:
        store: at the directory, with the archive.
        media_ids: those that the database knows.
    """

    directory: Path
    url: str | None
    media_ids: dict[str, str]
    waiting: str
    unknown: str
    stray: str

    @property
    def store(self) -> MediaStore:
        return MediaStore(self.directory, 1 << 30, KEEP_S, self.url)

    @property
    def media_id(self) -> str:
        (media_id,) = self.media_ids.values()
        return media_id

    def adopt(self, store: MediaStore | None = None) -> int:
        return adopt_old_files(store or self.store, self.find_needs, lambda: self.media_ids)

    def find_needs(self, job_ids: Sequence[str]) -> dict[str, float | None]:
        known = {self.media_id.partition("/")[0]: 1.0, self.waiting: None} if self.media_ids else {}
        return {job_id: left_s for job_id, left_s in known.items() if job_id in job_ids}

    def check(self) -> None:
        """Check that known files are in their jobs' folders only, and all others where they were."""
        store = self.store
        job_id = self.media_id.partition("/")[0]
        files = JobFiles(store.archive or store.objects)
        assert read(store, self.media_id) == DATA
        assert store.require(self.media_id).state == DONE
        assert files.get(job_id, "image") == files.get(self.waiting, "image") == b"picture"
        assert files.get(self.waiting, "checkpoint") == b"state"
        for objects in filter(None, (store.objects, store.archive)):
            _, tries = list_old_folders(objects, objects.folders())
            assert set(tries) == {self.stray}
            assert set(objects.names(tries[self.stray])) == set(NAMES)
            assert set(objects.names(self.media_id)) == set(NAMES)
        keeper = store.objects if store.archive is None else store.archive
        assert keeper.names("jobs") == [self.unknown]
        assert keeper.names(f"jobs/{self.unknown}") == ["image"]


def raw_put(url: str, path: str, data: bytes) -> None:
    """Write a file below a URL without the tested code."""
    store, root = fsspec.url_to_fs(url)
    store.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    store.pipe_file(f"{root}/{path}", data)


@dataclass
class CurrentFiles:
    """Files as this release writes them, and their ids."""

    directory: Path
    finished: str
    waiting: str
    unknown: str
    try_id: str
    stray: str


@pytest.fixture(scope="module")
def current_files(tmp_path_factory: pytest.TempPathFactory) -> CurrentFiles:
    """Files of this release; written once, because each is synced to the disk."""
    directory = tmp_path_factory.mktemp("written")
    made = CurrentFiles(directory, *(new_job_id() for _ in range(3)), uuid.uuid4().hex, uuid.uuid4().hex)
    store = MediaStore(directory, 1 << 30, KEEP_S)
    files = JobFiles(store.objects)
    for owner, try_id in ((made.finished, made.try_id), (f"video_gen_{made.stray}", made.stray)):
        entry = store.create(f"{owner}/{try_id}", "video/mp4", ".mp4", is_live=False)
        entry.path.write_bytes(DATA)
        entry.finish()
        for name in NAMES[3:]:
            (entry.path.parent / name).write_bytes(b"{}")
    for owner in (made.finished, made.waiting, made.unknown):
        files.put(owner, "image", b"picture")
    files.put(made.waiting, "checkpoint", b"state")
    return made


def make_old(current_files: CurrentFiles, directory: Path, url: str | None) -> OldStore:
    """Put files where releases up to 0002 had them."""
    root = f"file://{directory}/media"
    (directory / "media").mkdir()
    for path in sorted(current_files.directory.rglob("*")):
        if not path.is_file():
            continue
        owner, *rest = path.relative_to(current_files.directory).parts
        data = path.read_bytes()
        if len(rest) == 1:
            raw_put(url or root, f"jobs/{owner}/{rest[0]}", data)
        else:
            raw_put(root, "/".join(rest), data)
            if url:
                raw_put(url, f"clips/{'/'.join(rest)}", data)
    media_ids = {current_files.try_id: f"{current_files.finished}/{current_files.try_id}"}
    return OldStore(
        directory / "media", url, media_ids, current_files.waiting, current_files.unknown, current_files.stray
    )


@pytest.fixture(params=["directory", "file archive", "object archive"])
def old(request: pytest.FixtureRequest, current_files: CurrentFiles, tmp_path: Path) -> Iterator[OldStore]:
    urls = {
        "directory": None,
        "file archive": f"file://{tmp_path}/archive",
        "object archive": f"memory://{uuid.uuid4().hex}/archive",
    }
    yield make_old(current_files, tmp_path, urls[str(request.param)])
    fsspec.filesystem("memory").store.clear()


def test_known_files_are_moved_once(old: OldStore) -> None:
    assert old.adopt() == (3 if old.url is None else 4)
    old.check()
    assert old.adopt() == 0
    old.check()


def test_two_starts_at_once_lose_nothing(old: OldStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(old.adopt) for _ in range(2)]:
            done.result(60)
    old.check()


def files_in(old: OldStore) -> dict[str, bytes]:
    """Path -> content, in the directory and the archive."""
    found = {}
    for url in filter(None, (f"file://{old.directory}", old.url)):
        files, root = fsspec.url_to_fs(url)
        found |= {path: files.cat_file(path) for path in files.find(root)}
    return found


def test_another_apps_files_are_not_moved(old: OldStore) -> None:
    media_ids, old.media_ids = old.media_ids, {}
    before = files_in(old)
    assert old.adopt() == 0
    old.store.sweep(old.find_needs, time.time())
    assert files_in(old) == before
    old.media_ids = media_ids
    old.adopt()
    old.check()


def test_files_that_are_not_moved_expire_by_age(old: OldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt after ``keep_s``, a job's files after an hour at least; damaged entries stay."""
    old.adopt()
    store = MediaStore(old.directory, 1 << 30, 100.0, old.url)
    damaged = f"{old.url or f'file://{old.directory}'}/clips/{'0' * 32}"
    raw_put(damaged, "begun.json", b"{")
    before = files_in(old)
    now_s = time.time()
    for after_s, num_removed in ((90, 0), (200, 1 if old.url is None else 2), (sweeper.ORPHAN_S + 60, 1)):
        again = MediaStore(old.directory, 1 << 30, 100.0, old.url)  # a new store, which sweeps its archive at once
        assert again.sweep(old.find_needs if after_s < 3600 else lambda _: {}, now_s + after_s) >= num_removed
    left = [path for path in files_in(old) if "/clips/" in path or "/jobs/" in path or old.stray in path]
    assert [path.rpartition("/")[2] for path in left] == ["begun.json"]
    assert len(before) > len(left)
    assert store.find(old.media_id) is None


def test_an_encoders_sweep_of_a_cache_keeps_files_of_jobs(current_files: CurrentFiles, tmp_path: Path) -> None:
    """They predate the archive, and only a Director knows their jobs."""
    old = make_old(current_files, tmp_path, None)
    files = JobFiles(DirectoryObjects(old.directory))
    kept = new_job_id()
    files.put(kept, "image", b"picture")
    store = MediaStore(old.directory, 1, 100.0, f"file://{tmp_path}/archive")
    store.sweep(None, time.time() + 1e6)
    assert files.get(kept, "image") == b"picture"
    assert len(store.objects.names("jobs")) == 3
    assert store.objects.folders() == ["jobs", kept]


def no_space() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["directory", "file archive", "object archive"])
def test_a_full_disk_at_every_step_loses_nothing_and_the_next_start_goes_on(
    kind: str, current_files: CurrentFiles, tmp_path: Path
) -> None:
    seen: list[str] = []
    num_refused = 0
    for step in range(1, 1000):
        place = tmp_path / str(step)
        place.mkdir()
        url = {"directory": None, "file archive": f"file://{place}/archive"}.get(kind, f"memory://{step}/archive")
        old = make_old(current_files, place, url)
        store = old.store
        with pytest.MonkeyPatch.context() as patch:
            reached = act_at(step, no_space, patch)
            try:
                old.adopt(store)
            except MediaStoreError as error:
                assert "No space left" in str(error)  # noqa: PT017
                assert "nothing is lost" in str(error)  # noqa: PT017
                num_refused += 1
        old.adopt()
        old.check()
        if not reached:
            break
        seen += reached
    assert {"rename", "mkdir"} <= set(seen)
    assert len(seen) > num_refused > 10
    fsspec.filesystem("memory").store.clear()


def kill_at_every_step(current_files: CurrentFiles, place: Path, has_archive: bool) -> int:
    """Kill a process at each step of a move, on fresh copies, then finish the move; return the number of steps."""
    for step in itertools.count(1):
        directory = place / str(step)
        directory.mkdir()
        old = make_old(current_files, directory, f"file://{directory}/archive" if has_archive else None)
        store = old.store
        is_killed = is_killed_at(step, lambda old=old, store=store: old.adopt(store))
        old.adopt()
        old.check()
        if not is_killed:
            return step - 1
    raise AssertionError("unreachable")


@pytest.mark.parametrize("has_archive", [False, True], ids=["directory", "file archive"])
def test_killed_at_any_step_it_loses_nothing_and_the_next_start_goes_on(
    has_archive: bool, current_files: CurrentFiles, tmp_path: Path
) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fork needs a process with one thread
        assert pool.submit(kill_at_every_step, current_files, tmp_path, has_archive).result(300) > 10


def test_objects_are_copied_before_any_goes(
    current_files: CurrentFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are copied last."""
    url = f"memory://{uuid.uuid4().hex}/archive"
    old = make_old(current_files, tmp_path, url)
    store = old.store
    assert store.archive is not None
    assert isinstance(store.archive, FsspecObjects)
    steps: list[tuple[str, str]] = []
    memory = type(fsspec.filesystem("memory"))
    copy, remove = memory.cp_file, memory.rm
    monkeypatch.setattr(
        memory, "cp_file", lambda self, a, b, **o: (steps.append(("copy", a)), copy(self, a, b, **o))[1]
    )
    monkeypatch.setattr(memory, "rm", lambda self, a, **o: (steps.append(("remove", a)), remove(self, a, **o))[1])
    old.adopt(store)
    try_id = old.media_id.partition("/")[2]
    mine = [(verb, path.rpartition("/")[2]) for verb, path in steps if f"clips/{try_id}" in path]
    assert [verb for verb, _ in mine] == ["copy"] * len(NAMES) + ["remove"]
    kinds = [name.endswith(".json") for _, name in mine[:-1]]
    assert kinds == sorted(kinds)
    old.check()


def test_unknown_files_are_left_alone(current_files: CurrentFiles, tmp_path: Path) -> None:
    old = make_old(current_files, tmp_path, None)
    (old.directory / "notes").write_text("mine")
    (old.directory / "jobs" / "notes").write_text("mine")
    (old.directory / ("f" * 32)).write_text("a file with a try's name")
    old.adopt()
    assert (old.directory / "notes").read_text() == (old.directory / "jobs" / "notes").read_text() == "mine"
    assert (old.directory / ("f" * 32)).is_file()
