"""Files of jobs in a directory and an archive: round trips, damage, killed writers, sweeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from cosmos3_core.errors import MediaError
from deployments.jobs import store as store_module
from deployments.jobs.job import new_job_id
from deployments.jobs.store import JobStore
from deployments.media import sweeper as sweeper_module
from deployments.media.fsspec_objects import ObjectsError, hide_secrets, open_objects
from deployments.media.job_files import JobFiles
from deployments.media.objects import DirectoryObjects
from deployments.media.sweeper import FindNeeds, sweep
from tests.jobs.making import LIMITS, new_job
from tests.virtual_time import set_clocks

DATA = bytes(range(256)) * 40
KEEP_S = 100.0
DEADLINE_S = 60.0


class Place:
    """A place of files, with access that bypasses :class:`JobFiles`."""

    def __init__(self, directory: Path, archive_url: str | None) -> None:
        self.raw = fsspec.filesystem("memory" if str(archive_url).startswith("memory") else "file")
        self.objects = open_objects(archive_url) if archive_url else DirectoryObjects(directory)
        self.files = JobFiles(self.objects)
        self.root = archive_url.removeprefix("file://") if archive_url else str(directory)

    def path(self, *names: str) -> str:
        return "/".join([self.root, *names])

    def list_names(self) -> list[str]:
        found = self.raw.find(self.root) if self.raw.exists(self.root) else []
        return sorted(path.removeprefix(self.raw._strip_protocol(self.root) + "/") for path in found)

    def sweep(self, find_needs: FindNeeds, now_s: float) -> int:
        return sweep(self.objects, find_needs, KEEP_S, now_s)


@pytest.fixture(params=["directory", "file archive", "object archive"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "directory":
        yield Place(tmp_path, None)
    elif request.param == "file archive":
        yield Place(tmp_path / "unused", f"file://{tmp_path}/archive")
        assert not (tmp_path / "unused").exists()
    else:
        url = f"memory://{uuid.uuid4().hex}/archive"
        yield Place(tmp_path / "unused", url)
        assert not (tmp_path / "unused").exists()
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    "data", [DATA, b"", memoryview(DATA)[5:], b"\n\0" * 1000], ids=["some", "none", "view", "lines"]
)
def test_bytes_survive_a_round_trip(place: Place, data: bytes) -> None:
    job_id = new_job_id()
    assert not place.files.exists(job_id, "checkpoint")
    place.files.put(job_id, "checkpoint", data)
    assert place.files.exists(job_id, "checkpoint")
    assert not place.files.exists(job_id, "image")
    found = place.files.get(job_id, "checkpoint")
    assert isinstance(found, bytes)
    assert found == bytes(data)
    assert place.list_names() == [f"{job_id}/checkpoint"]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5 * 6 * 7 * 3, dtype=np.uint8).reshape(5, 6, 7, 3),
        np.arange(60, dtype=np.uint8).reshape(3, 4, 5)[::-1, ::2].transpose(2, 0, 1),
        np.linspace(0, 1, 7, dtype=np.float32),
        np.zeros((0, 4), np.uint8),
        np.array(3.5),
        np.array([[True, False]]),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_survive_a_round_trip(place: Place, array: np.ndarray) -> None:
    job_id = new_job_id()
    place.files.put(job_id, "clip", array)
    found = place.files.get(job_id, "clip")
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("array", [np.array([{}], object), np.array(["a"]), np.zeros(1, "V8"), np.zeros((1,) * 9)])
def test_an_array_that_needs_pickle_is_refused(place: Place, array: Any) -> None:
    with pytest.raises(ValueError, match="must be an array of numbers"):
        place.files.put(new_job_id(), "clip", array)
    assert place.list_names() == []


def test_a_file_replaces_the_one_before(place: Place) -> None:
    job_id = new_job_id()
    for data in (DATA, b"new", DATA[1:]):
        place.files.put(job_id, "checkpoint", data)
        assert place.files.get(job_id, "checkpoint") == data
    place.files.put(job_id, "image", b"other")
    assert place.list_names() == [f"{job_id}/checkpoint", f"{job_id}/image"]


def test_removing_a_job_removes_all_its_files_and_no_other(place: Place) -> None:
    one, other = new_job_id(), new_job_id()
    for job_id in (one, other):
        place.files.put(job_id, "checkpoint", DATA)
        place.files.put(job_id, "image", DATA)
    place.files.remove(one)
    place.files.remove(one)
    place.files.remove(new_job_id())
    assert place.list_names() == [f"{other}/checkpoint", f"{other}/image"]
    assert not place.files.exists(one, "image")
    with pytest.raises(MediaError, match=f"{one} has no image"):
        place.files.get(one, "image")


PATHS = ["", "..", "../x", "a/b", "A", "a1", "a" * 17, ".part", "a\n", "ä", None, 5, b"a"]


@pytest.mark.parametrize("name", PATHS, ids=repr)
def test_an_invalid_name_never_becomes_a_path(place: Place, name: Any) -> None:
    for job_id, file_name in ((new_job_id(), name), (name, "image"), (f"video_gen_{name}", "image")):
        with pytest.raises(ValueError, match="must be"):
            place.files.put(job_id, file_name, DATA)
        with pytest.raises(ValueError, match="must be"):
            place.files.get(job_id, file_name)
        with pytest.raises(ValueError, match="must be"):
            place.files.exists(job_id, file_name)
    with pytest.raises(ValueError, match="must be"):
        place.files.remove(name)
    assert place.list_names() == []


def test_every_kind_of_damage_is_found(place: Place) -> None:
    """Any flipped byte, and any truncation."""
    job_id = new_job_id()
    for data in (b"some state", np.arange(4, dtype=np.uint8).reshape(2, 2)):
        place.files.put(job_id, "checkpoint", data)
        path = place.path(job_id, "checkpoint")
        whole = place.raw.cat_file(path)
        damages = [whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :] for index in range(len(whole))]
        damages += [whole[:index] for index in range(len(whole))] + [whole + b"\0", b"[" * 10_000, b"\n" * 10]
        for damaged in damages:
            place.raw.pipe_file(path, damaged)
            with pytest.raises(MediaError, match=f"checkpoint of {job_id} is damaged"):
                place.files.get(job_id, "checkpoint")
        place.raw.pipe_file(path, whole)
        place.files.get(job_id, "checkpoint")


def test_a_sweep_removes_unneeded_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper_module, "ORPHAN_S", 2 * KEEP_S)
    known, fresh, old, ended = new_job_id(), new_job_id(), new_job_id(), new_job_id()
    for job_id in (known, old, ended):
        place.files.put(job_id, "image", DATA)
    now_s = time.time()
    place.raw.makedirs(place.path("mine"))
    place.raw.pipe_file(place.path("mine", "notes"), b"no job")
    asked: list[str] = []

    def find_needs(job_ids: Sequence[str]) -> dict[str, float | None]:
        asked.extend(job_ids)
        return {known: None, ended: 0.0}

    assert place.sweep(find_needs, now_s + 2 * KEEP_S - 1) == 1, "of the one that has ended, however young"
    place.files.put(fresh, "image", DATA)
    assert place.sweep(lambda ids: dict.fromkeys(ids), now_s + 10 * KEEP_S) == 0
    assert place.sweep(find_needs, now_s + 2 * KEEP_S + 5) == 2
    assert place.list_names() == ["mine/notes", f"{known}/image"]
    assert set(asked) == {known, fresh, old, ended}


def test_needs_are_found_for_any_number_of_jobs(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several queries are needed: databases bound the parameters of one."""
    monkeypatch.setattr(store_module, "_IDS_AT_ONCE", 2)
    waiting = [store.create(new_job(), LIMITS).job_id for _ in range(5)]
    store.cancel(waiting[4])
    assert store.find_folder_needs([*waiting, new_job_id()]) == {**dict.fromkeys(waiting[:4]), waiting[4]: 0.0}
    assert store.find_folder_needs([]) == {}


def test_the_newest_file_is_a_jobs_age(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper_module, "ORPHAN_S", KEEP_S)
    job_id, now_s = new_job_id(), time.time()
    place.files.put(job_id, "image", DATA)
    set_clocks(monkeypatch, time_s=lambda: now_s + 5 * KEEP_S)
    place.files.put(job_id, "checkpoint", DATA)
    place.raw.pipe_file(place.path(job_id, "damaged"), b"no header")
    set_clocks(monkeypatch, time_s=lambda: now_s)
    assert place.sweep(lambda _: {}, now_s + 5.5 * KEEP_S) == 0
    assert place.sweep(lambda _: {}, now_s + 7 * KEEP_S) == 1


def test_a_killed_writer_leaves_the_previous_file(tmp_path: Path) -> None:
    """Killed repeatedly while writing: the file is always complete, and leftovers are swept."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom deployments.media.job_files import JobFiles\n"
        "from deployments.media.objects import DirectoryObjects\n"
        "files = JobFiles(DirectoryObjects(Path(sys.argv[1])))\nprint('go', flush=True)\n"
        "for index in range(10**9):\n    files.put(sys.argv[2], 'checkpoint', bytes([index % 256]) * 3_000_000)\n"
    )
    job_id, files = new_job_id(), JobFiles(DirectoryObjects(tmp_path))
    files.put(job_id, "checkpoint", b"before")
    for delay_s in (0.0, 0.02, 0.05, 0.09):
        command = [sys.executable, "-c", program, str(tmp_path), job_id]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay_s)
            child.send_signal(signal.SIGKILL)
        data = files.get(job_id, "checkpoint")
        assert isinstance(data, bytes)
        assert data == b"before" or (len(data) == 3_000_000 and len(set(data)) == 1)
    sweep(DirectoryObjects(tmp_path), lambda ids: dict.fromkeys(ids), KEEP_S, time.time() + 2 * KEEP_S)
    assert os.listdir(tmp_path) == [job_id]
    assert os.listdir(tmp_path / job_id) == ["checkpoint"]


def test_a_writer_that_dies_before_the_rename_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, files = new_job_id(), JobFiles(DirectoryObjects(tmp_path))
    files.put(job_id, "checkpoint", b"before")
    synced: list[str] = []

    def full(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MediaError, match="checkpoint of video_gen_.* cannot be written: .*No space left"):
        files.put(job_id, "checkpoint", DATA)
    assert len(synced) == 1
    assert files.get(job_id, "checkpoint") == b"before"
    assert os.listdir(tmp_path) == [job_id]


def test_a_put_during_a_removal_ends_with_either_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is removed just before the file is moved into it."""
    job_id, files = new_job_id(), JobFiles(DirectoryObjects(tmp_path))
    replace, num_removed = Path.replace, 0

    def remove_first(self: Path, target: Path) -> Path:
        nonlocal num_removed
        if num_removed < 2:
            num_removed += 1
            files.remove(job_id)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", remove_first)
    files.put(job_id, "image", DATA)
    assert files.get(job_id, "image") == DATA


def test_an_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in its place")
    files, job_id = JobFiles(DirectoryObjects(tmp_path / "store")), new_job_id()
    with pytest.raises(MediaError, match="image of video_gen_.* cannot be written"):
        files.put(job_id, "image", DATA)
    with pytest.raises(MediaError, match="image of video_gen_.* cannot be read"):
        files.get(job_id, "image")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/a/directory", "is no place for files: a single URL is"),
        ("simplecache::s3://bucket", "is no place for files"),
        ("nosuch://bucket/p", "nosuch://bucket/p cannot be opened: .*nosuch"),
    ],
)
def test_an_invalid_archive_url_is_refused(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(ObjectsError, match=said):
        open_objects(url)


def test_an_archive_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ObjectsError, match="s3:// needs a package that is not installed: .*s3fs"):
        open_objects("s3://bucket/prefix")


class Unreachable(fsspec.AbstractFileSystem):
    """A file system whose errors contain the options it was opened with."""

    protocol = "unreachable"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.options = options

    @classmethod
    def _get_kwargs_from_urls(cls, path: str) -> dict[str, Any]:
        return {"url": path}

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        raise RuntimeError(f"no such host: {self.options}")

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"no such host: {self.options}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


def test_no_message_has_credentials(tmp_path: Path) -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    url = "unreachable://someone:se%20cret@host/prefix?token=t0ken#x"
    files, job_id = JobFiles(open_objects(url)), new_job_id()
    for work in (
        lambda: files.put(job_id, "image", DATA),
        lambda: files.get(job_id, "image"),
        lambda: files.exists(job_id, "image"),
        lambda: files.remove(job_id),
    ):
        with pytest.raises(MediaError, match=r"unreachable://\*\*\*@host/prefix: RuntimeError: no such host") as raised:
            work()
        error: BaseException | None = raised.value
        while error is not None:
            assert not any(secret in str(error) for secret in ("se%20cret", "se cret", "t0ken", "someone"))
            error = error.__cause__
    assert hide_secrets(url) == "unreachable://***@host/prefix"
