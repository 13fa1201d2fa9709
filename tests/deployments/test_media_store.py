"""The media store shared by readers, writers and sweepers of several processes; damage; races."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.errors import MediaError
from deployments.config import MediaConfig
from deployments.errors import MediaStoreError
from deployments.jobs.job import new_job_id
from deployments.media import store as media_store
from deployments.media.job_files import JobFiles
from deployments.media.layout import DONE, FAILED, WRITING, MediaRecord, new_media_id
from deployments.media.objects import DirectoryObjects
from deployments.media.store import MediaEntry, MediaStore
from tests.deployments.clips import DATA, begin, make, read, sweep

KEEP_S = 100.0


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "made" / "media", max_bytes=1 << 20, keep_s=KEEP_S)


def find_record(store: MediaStore, media_id: str) -> MediaRecord:
    record = store.find(media_id)
    assert record is not None
    return record


def make_older(store: MediaStore, media_id: str, seconds: float) -> None:
    """Make a clip's files and records older."""
    folder = store.directory / media_id
    for path in (*folder.iterdir(), folder, folder.parent):
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            path.write_text(json.dumps(values | {"updated_s": values["updated_s"] - seconds}))
        os.utime(path, (time.time() - seconds,) * 2)


def list_entries(store: MediaStore) -> list[str]:
    """List the media ids in the store, and names that are no job's folder."""
    found = []
    for path in store.directory.iterdir():
        inside = sorted(path.iterdir()) if path.name.startswith("video_gen_") and path.is_dir() else []
        found += [f"{path.name}/{each.name}" for each in inside] or [path.name]
    return sorted(found)


def test_a_clip_is_written_then_complete(store: MediaStore) -> None:
    before_s = time.time()
    media_id, entry = begin(store)
    reader = MediaStore(store.directory, 1, 1)
    record = find_record(reader, media_id)
    assert (record.state, record.media_type, record.num_bytes, record.reason) == (WRITING, "video/mp4", 0, "")
    assert before_s <= record.created_s == record.updated_s <= time.time()
    assert reader.live_path(record) == entry.live_path
    assert not entry.path.exists(), "the writer's business"
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"grows")
    entry.path.write_bytes(DATA)
    entry.finish()
    record = reader.require(media_id)
    assert (record.state, record.num_bytes) == (DONE, len(DATA))
    assert record.etag == f'"{hashlib.sha256(DATA).hexdigest()}"' != record.live_etag
    assert record.updated_s >= record.created_s
    assert reader.file_path(record).read_bytes() == DATA
    assert list_entries(store) == [media_id]
    assert sorted(os.listdir(store.directory / media_id)) == ["begun.json", "clip.mp4", "ended.json", "live.mp4"]


@pytest.mark.parametrize(("age_s", "touched_s", "is_kept"), [(400, None, False), (200, None, True), (400, 200, True)])
def test_the_live_file_of_a_finished_clip_goes_once_nobody_reads_it(
    age_s: float, touched_s: float | None, is_kept: bool, tmp_path: Path
) -> None:
    store = MediaStore(tmp_path, max_bytes=1 << 20, keep_s=86400.0)
    media_id, entry = begin(store)
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"grows")
    entry.path.write_bytes(DATA)
    entry.finish()
    make_older(store, media_id, age_s)
    if touched_s is not None:  # as readers do
        os.utime(entry.live_path, (time.time() - touched_s,) * 2)
    assert sweep(store) == 0
    assert entry.live_path.exists() == is_kept
    assert read(store, media_id) == DATA


def test_the_live_file_of_a_clip_that_is_written_stays(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, max_bytes=1 << 20, keep_s=86400.0)
    media_id, entry = begin(store)
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"grows")
    make_older(store, media_id, 4000.0)
    sweep(store)
    assert entry.live_path.exists()


def test_a_clip_may_lack_a_live_file(store: MediaStore) -> None:
    media_id, entry = begin(store, is_live=False)
    assert entry.live_path is None
    assert find_record(store, media_id).live_name == ""


def test_a_finished_file_is_read_in_parts(store: MediaStore) -> None:
    media_id = make(store)
    assert read(store, media_id) == DATA
    assert read(store, media_id, 10, 5) == DATA[10:15]
    assert read(store, media_id, 1000) == DATA[1000:]
    assert read(store, media_id, len(DATA) - 1, 100) == DATA[-1:]
    assert read(store, media_id, len(DATA), 100) == read(store, media_id, 1 << 60, 100) == b""


def test_a_lost_file_is_not_found(store: MediaStore) -> None:
    media_id = make(store)
    store.file_path(find_record(store, media_id)).unlink()
    with pytest.raises(FileNotFoundError):
        read(store, media_id)


OUTSIDE = f"video_gen_{'0' * 32}/{'0' * 32}"


PATHS = ["", ".", "..", "../" + OUTSIDE, OUTSIDE + "/", ".new-" + OUTSIDE, OUTSIDE + "\n"]
OTHERS = [OUTSIDE[:-1], OUTSIDE + "0", OUTSIDE[:-1] + "A", OUTSIDE[:-1] + "\0", OUTSIDE[:-1] + "٠", "0" * 32]
OTHERS += [OUTSIDE.replace("/", "/../"), OUTSIDE.partition("/")[0], "x" * 1_000_000, None, 5, OUTSIDE.encode()]


@pytest.mark.parametrize("media_id", [*PATHS, *OTHERS], ids=lambda value: repr(value)[:20])
def test_an_invalid_id_never_becomes_a_path(store: MediaStore, media_id: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_store, "find_record", lambda _, folder: pytest.fail(f"{folder} was looked at"))
    assert store.find(media_id) is None
    monkeypatch.setattr(DirectoryObjects, "remove", lambda *names: pytest.fail(f"{names} was to be removed"))
    store.fail(media_id, "why")
    store.remove(media_id)
    with pytest.raises(MediaStoreError):
        store.require(media_id)
    with pytest.raises((ValueError, TypeError)):
        store.create(media_id, "video/mp4", ".mp4", is_live=True)
    assert list_entries(store) == []


@pytest.mark.parametrize(("media_type", "suffix"), [("video", ".mp4"), ("video/mp4", "/../a"), ("video/mp4", "")])
def test_an_invalid_suffix_never_becomes_a_path(store: MediaStore, media_type: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="should match"):
        store.create(new_media_id(new_job_id()), media_type, suffix, is_live=True)
    assert list_entries(store) == []


def test_an_id_is_used_for_one_clip(store: MediaStore) -> None:
    media_id = make(store)
    with pytest.raises(MediaError, match="cannot take"):
        store.create(media_id, "video/mp4", ".mp4", is_live=True)
    assert read(store, media_id) == DATA
    assert list_entries(store) == [media_id]


def test_the_first_failure_is_final(store: MediaStore) -> None:
    media_id, entry = begin(store)
    entry.path.write_bytes(DATA)
    other = MediaStore(store.directory, 1, 1)
    other.fail(media_id, "the encoder died " + "\N{BUG}\ud800" * 10_000)
    record = find_record(store, media_id)
    assert (record.state, record.num_bytes) == (FAILED, 0)
    assert record.reason.startswith("the encoder died \N{BUG}")
    assert len(record.reason) == 2000
    store.fail(media_id, "again")
    assert find_record(store, media_id) == record
    with pytest.raises(MediaError, match="was declared failed while it was written"):
        entry.finish()
    assert find_record(store, media_id) == record


def test_a_completed_clip_cannot_fail(store: MediaStore) -> None:
    media_id = make(store)
    record = find_record(store, media_id)
    store.fail(media_id, "too late")
    store.fail(new_media_id(new_job_id()), "there is none")
    assert find_record(store, media_id) == record
    assert sorted(os.listdir(store.directory / media_id)) == ["begun.json", "clip.mp4", "ended.json"]


def test_one_of_several_concurrent_ends_wins(store: MediaStore) -> None:
    """All of them see the same winner, then and later."""
    for _ in range(20):
        media_id, entry = begin(store)
        entry.path.write_bytes(DATA)
        together = threading.Barrier(4)

        def finish(entry: MediaEntry = entry, together: threading.Barrier = together) -> bool:
            together.wait(30)
            try:
                entry.finish()
            except MediaError:
                return False
            return True

        def fail(index: int, media_id: str = media_id, together: threading.Barrier = together) -> None:
            together.wait(30)
            store.fail(media_id, f"failure {index}")

        with ThreadPoolExecutor(4) as pool:
            others = [pool.submit(fail, index) for index in range(3)]
            has_finished = pool.submit(finish).result(30)
            for other in others:
                other.result(30)
        record = find_record(store, media_id)
        assert record.state == (DONE if has_finished else FAILED)
        assert bool(record.reason) != has_finished


def test_a_failure_that_cannot_be_recorded_raises_nothing(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    media_id, _ = begin(store)
    monkeypatch.setattr(media_store.logger, "propagate", True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DirectoryObjects, "create", full)
    store.fail(media_id, "why")
    assert f"the failure of {media_id} could not be written" in caplog.text
    assert find_record(store, media_id).state == WRITING


def test_a_clip_without_a_file_cannot_complete(store: MediaStore) -> None:
    media_id, entry = begin(store)
    with pytest.raises(MediaError, match="is not in the media store"):
        entry.finish()
    assert find_record(store, media_id).state == WRITING


def test_nodes_must_share_one_directory(store: MediaStore, tmp_path: Path) -> None:
    elsewhere = MediaStore(tmp_path / "elsewhere", 1, 1)
    with pytest.raises(MediaStoreError, match=f"in {elsewhere.directory}: media.directory must be one directory for"):
        elsewhere.require(make(store))


def test_a_file_is_synced_before_it_is_complete(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    media_id, entry = begin(store)
    synced: list[tuple[str, str]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix, find_record(store, media_id).state))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    entry.path.write_bytes(DATA)
    entry.finish()
    assert synced[:2] == [(".mp4", WRITING), (".part", WRITING)]
    assert len(synced) == 3, "and the directory that names the record"
    assert find_record(store, media_id).state == DONE


# Removing


def test_removing_a_clip_removes_all_its_files_and_no_other(store: MediaStore) -> None:
    media_id, kept = make(store), make(store)
    failed = begin(store)[0]
    store.fail(failed, "why")
    for gone in (media_id, failed, new_media_id(new_job_id())):
        store.remove(gone)
        store.remove(gone)
        assert store.find(gone) is None
    assert list_entries(store) == [kept]
    assert read(store, kept) == DATA


def test_removing_a_growing_clip_ends_its_viewers_and_writer(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    media_id, entry = begin(store)
    entry.path.write_bytes(DATA)
    seen: list[tuple[str, str]] = []
    remove = DirectoryObjects.remove

    def watch(self: DirectoryObjects, media_id: str) -> bool:
        record = find_record(store, media_id)
        seen.append((record.state, record.reason))
        return remove(self, media_id)

    monkeypatch.setattr(DirectoryObjects, "remove", watch)
    store.remove(media_id)
    assert seen == [(FAILED, "it was removed")]
    with pytest.raises(MediaError, match="is not in the media store"):
        entry.finish()
    assert list_entries(store) == []


def test_an_open_file_can_be_read_after_its_removal(store: MediaStore) -> None:
    media_id = make(store)
    with store.open(find_record(store, media_id)) as file:
        store.remove(media_id)
        assert file.read() == DATA


def test_an_interrupted_removal_is_finished_by_a_sweep(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was killed after the rename, or could not delete."""
    media_id = make(store)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    store.remove(media_id)
    monkeypatch.undo()
    assert store.find(media_id) is None
    assert [Path(name).suffix for name in list_entries(store)] == [".part"]
    sweep(store, time.time() + 2 * KEEP_S)
    assert list_entries(store) == []


def test_a_failed_removal_is_logged(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    media_id = make(store)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MediaError, match=f"{media_id} cannot be removed: .*Permission denied"):
        store.remove(media_id)
    monkeypatch.undo()
    assert read(store, media_id) == DATA


# Sweeping


def test_old_clips_are_swept_and_new_ones_kept(store: MediaStore) -> None:
    old, new, failed = make(store), make(store), begin(store)[0]
    store.fail(failed, "why")
    make_older(store, old, KEEP_S + 5)
    make_older(store, failed, KEEP_S + 5)
    make_older(store, new, KEEP_S - 50)
    assert sweep(store) == 2
    assert list_entries(store) == [new]
    assert store.find(old) is None
    assert sweep(store, time.time() + KEEP_S) == 1
    assert list_entries(store) == []


def test_growing_clips_are_kept_and_stalled_ones_failed(store: MediaStore) -> None:
    growing, given_up = begin(store), begin(store)
    for media_id, entry in (growing, given_up):
        assert entry.live_path is not None
        entry.live_path.write_bytes(b"a")
        make_older(store, media_id, KEEP_S + 50)
    assert growing[1].live_path is not None
    growing[1].live_path.write_bytes(b"more")
    assert sweep(store) == 1
    assert list_entries(store) == [growing[0]]
    store.fail(given_up[0], "it is gone: nothing to say")
    with pytest.raises(MediaError, match="is not in the media store"):
        given_up[1].finish()


def test_too_many_bytes_remove_the_oldest_finished_clips(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, max_bytes=35_000, keep_s=KEEP_S)
    clips = [make(store, bytes(10_000)) for _ in range(4)]
    for index, media_id in enumerate(clips):
        make_older(store, media_id, 40 - 10 * index)
    writing, entry = begin(store)
    entry.path.write_bytes(bytes(8_000))
    make_older(store, writing, 90)
    assert sweep(store) == 2
    assert list_entries(store) == sorted([*clips[2:], writing])
    entry.path.write_bytes(bytes(50_000))
    assert sweep(store) == 1, "what is being written is not removed for it, and counts up to half"
    assert list_entries(store) == sorted([clips[3], writing])
    assert sweep(store) == 0


def test_the_bound_of_bytes_is_exact(store: MediaStore) -> None:
    make(store), make(store)
    num_bytes = sum(path.stat().st_size for path in store.directory.glob("*/*/*"))
    assert sweep(MediaStore(store.directory, num_bytes, KEEP_S)) == 0
    assert sweep(MediaStore(store.directory, num_bytes - 1, KEEP_S)) == 1
    assert len(list_entries(store)) == 1


def test_files_of_unfinished_jobs_count_for_up_to_half_of_the_bytes(tmp_path: Path) -> None:
    store, job_id = MediaStore(tmp_path, max_bytes=50_000, keep_s=KEEP_S), new_job_id()
    files = JobFiles(store.objects)
    clips = [make(store, bytes(10_000)) for _ in range(4)]
    for index, media_id in enumerate(clips):
        make_older(store, media_id, 40 - 10 * index)
    assert sweep(store) == 0
    files.put(job_id, "image", bytes(15_000))
    assert sweep(store) == 1
    assert list_entries(store) == sorted([*clips[1:], f"{job_id}/image"])
    files.put(job_id, "image", bytes(500_000))
    assert sweep(store) == 1, "two have room in the other half"
    assert list_entries(store) == sorted([*clips[2:], f"{job_id}/image"])
    assert len(files.get(job_id, "image")) == 500_000


def damage(name: str) -> Callable[[dict[str, Any]], str]:
    values = {
        "nothing": lambda record: "",
        "half": lambda record: json.dumps(record)[:50],
        "bytes": lambda record: "\0" * 400,
        "deep": lambda record: "[" * 50_000,
        "list": lambda record: "[]",
        "key more": lambda record: json.dumps(record | {"more": 1}),
        "key less": lambda record: json.dumps({key: record[key] for key in list(record)[1:]}),
        "other id": lambda record: json.dumps(record | {"media_id": "1" * 32}),
        "path as id": lambda record: json.dumps(record | {"media_id": "../" + record["media_id"]}),
        "path": lambda record: json.dumps(record | {"file_name": "../../etc/passwd"}),
        "live path": lambda record: json.dumps(record | {"live_name": "live./etc"}),
        "state": lambda record: json.dumps(record | {"state": "new"}),
        "no hash": lambda record: json.dumps(record | {"state": "done"}),
        "text": lambda record: json.dumps(record | {"updated_s": "now"}),
        "true": lambda record: json.dumps(record | {"num_bytes": True}),
        "NaN": lambda record: json.dumps(record | {"updated_s": float("nan")}),
        "huge": lambda record: json.dumps(record | {"updated_s": 10**400}),
        "endless": lambda record: json.dumps(record).replace('"num_bytes": 0', '"num_bytes": ' + "1" * 5000),
        "long": lambda record: json.dumps(record | {"reason": "x" * 100_000}),
    }
    return values[name]


DAMAGES = ["nothing", "half", "bytes", "deep", "list", "key more", "key less", "other id", "path as id", "path"]
DAMAGES += ["live path", "state", "no hash", "text", "true", "NaN", "huge", "endless", "long"]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_clip_is_not_found_and_does_not_stop_a_sweep(store: MediaStore, name: str) -> None:
    damaged, old = begin(store)[0], make(store)
    path = store.directory / damaged / "begun.json"
    path.write_text(damage(name)(json.loads(path.read_text())))
    make_older(store, old, KEEP_S + 5)
    assert store.find(damaged) is None
    assert sweep(store) == 1
    assert list_entries(store) == [damaged]
    for changed in (path, path.parent, path.parent.parent):
        os.utime(changed, (time.time() - KEEP_S - 5,) * 2)
    assert sweep(store) == 1, "it goes as what is not damaged"


def test_a_damaged_end_counts_as_none(store: MediaStore) -> None:
    media_id = make(store)
    (store.directory / media_id / "ended.json").write_text("{")
    assert find_record(store, media_id).state == WRITING


def test_foreign_files_are_left_alone(store: MediaStore, tmp_path: Path) -> None:
    (store.directory / "a file").write_text("mine")
    (store.directory / ("0" * 32)).write_text("a file with a clip's name")
    (store.directory / ("1" * 32)).mkdir()
    (store.directory / f"video_gen_{'3' * 32}").write_text("a file with a job's name")
    (store.directory / ("2" * 32)).symlink_to(tmp_path / "nowhere")
    (store.directory / ".new-mine").mkdir()
    before = list_entries(store)
    assert sweep(store, time.time() + 10 * KEEP_S) == 0
    assert list_entries(store) == before


def test_the_archive_must_not_be_the_directory(tmp_path: Path) -> None:
    with pytest.raises(MediaStoreError, match=r"media.archive must be another place than media.directory"):
        MediaStore(tmp_path / "media", 1, KEEP_S, f"file://{tmp_path}/media")


@pytest.mark.parametrize("name", [".{}.part", f".new-{'a' * 32}-{{}}", f".swept-{'a' * 32}-{{}}"])
def test_temporary_files_of_dead_processes_are_swept(store: MediaStore, name: str) -> None:
    """Those of earlier releases too."""
    names = [name.format(digit * 16) for digit in "0123"]
    for index, name in enumerate(names):
        (store.directory / name).mkdir()
        (store.directory / name / "clip.mp4").write_bytes(DATA)
        if index % 2:
            os.utime(store.directory / name, (time.time() - KEEP_S - 5,) * 2)
    assert sweep(store) == 0
    assert list_entries(store) == sorted(names[::2])


def test_concurrent_sweeps_writes_and_reads_are_safe(tmp_path: Path) -> None:
    """The only error is that a clip is gone, and each clip is removed once."""
    stores = [MediaStore(tmp_path, max_bytes=3 * len(DATA), keep_s=KEEP_S) for _ in range(4)]
    made: list[str] = []
    stop = threading.Event()

    def sweep_on(store: MediaStore) -> int:
        num_removed = 0
        while not stop.is_set():
            num_removed += sweep(store)
        return num_removed

    def read_on(store: MediaStore) -> int:
        num_read = 0
        while not stop.is_set():
            for media_id in made[-3:]:
                try:
                    assert read(store, media_id) == DATA
                    num_read += 1
                except (MediaStoreError, FileNotFoundError):
                    pass
        return num_read

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(sweep_on, stores[0]), pool.submit(sweep_on, stores[1]), pool.submit(read_on, stores[2])]
        for _ in range(150):
            made.append(make(stores[3]))
        stop.set()
        *removed, num_read = [it.result(60) for it in work]
    last = sweep(stores[3])
    assert sum(removed) + last + len(list_entries(stores[3])) == len(made)
    assert num_read > 0
    assert 1 <= len(list_entries(stores[3])) <= 3
    assert all(name in made for name in list_entries(stores[3])), "nothing half removed"


def test_another_process_sees_and_ends_a_clip(store: MediaStore) -> None:
    """The writer is killed, so its own process cannot record the failure."""
    program = (
        "import sys, os\nfrom pathlib import Path\nfrom deployments.jobs.job import new_job_id\n"
        "from deployments.media.layout import new_media_id\nfrom deployments.media.store import MediaStore\n"
        "store = MediaStore(Path(sys.argv[1]), 1 << 20, 100)\nmedia_id = new_media_id(new_job_id())\n"
        "store.create(media_id, 'video/mp4', '.mp4', is_live=True).live_path.write_bytes(b'half')\n"
        "print(media_id, flush=True)\nos.kill(os.getpid(), 9)"
    )
    died = subprocess.run(
        [sys.executable, "-c", program, str(store.directory)], capture_output=True, text=True, timeout=60, check=False
    )
    media_id = died.stdout.strip()
    record = find_record(store, media_id)
    assert (record.state, store.live_path(record).read_bytes()) == (WRITING, b"half")
    store.fail(media_id, "the encoder died")
    assert find_record(store, media_id) == replace(
        record, state=FAILED, reason="the encoder died", updated_s=find_record(store, media_id).updated_s
    )


# The directory


def test_the_default_directory_is_private_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1))
    assert store.directory == tmp_path / ".local" / "state" / "cosmos3"
    assert store.directory.stat().st_mode & 0o777 == 0o700
    assert list_entries(store) == []
    assert MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1)).directory == store.directory
    store.directory.chmod(0o755)
    with pytest.raises(MediaStoreError, match="not a directory of this user alone; set media.directory to another one"):
        MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1))
    store.directory.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    store.directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MediaStoreError, match="not a directory of this user alone"):
        MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1))
    store.directory.unlink()
    store.directory.write_text("a file")
    with pytest.raises(MediaStoreError, match="cannot be made.*set media.directory"):
        MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1))
    monkeypatch.setenv("HOME", str(store.directory))
    with pytest.raises(MediaStoreError, match="cannot be made.*Not a directory.*set media.directory"):
        MediaStore.of(MediaConfig(directory=None, max_bytes=1, keep_s=1))


def test_an_unusable_directory_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaStoreError, match="cannot be used"):
        MediaStore.of(MediaConfig(directory=tmp_path / "file" / "media", max_bytes=1, keep_s=1))

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(DirectoryObjects, "read", refuse)
    with pytest.raises(MediaStoreError, match="media.directory .* cannot be used: .*Read-only file system"):
        MediaStore.of(MediaConfig(directory=tmp_path / "media", max_bytes=1, keep_s=1))


def test_a_file_system_without_hard_links_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = MediaStore(tmp_path / "media", 1 << 20, KEEP_S)
    media_id = make(store)
    store.fail(media_id, "too late")
    assert find_record(store, media_id).state == DONE
