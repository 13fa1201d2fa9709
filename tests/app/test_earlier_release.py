"""Data of earlier commits, opened by this release: every job ends as it would have, every file is served.

The fixtures are made by ``tests/fixtures/make_fixture.py``, which says what is in them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import sqlalchemy
from sqlalchemy import text

from cosmos3_core.media.probe import read_frames
from deployments.config import AppConfig
from deployments.director.recorder import SAVED_STATE
from deployments.errors import JobsError
from deployments.jobs.service import JobService
from deployments.media.layout import JOB_ID
from tests.app.http_jobs import events_of, wait_for_end
from tests.app.in_process import InProcessApp, app_config
from tests.app.local_ray import Loop
from tests.failing_steps import is_killed_at
from tests.jobs.postgres import fresh_database, load_dump, postgres_url  # noqa: F401  a fixture

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMPLETED = ("sound", "lossless", "image", "from_image", "from_clip", "previews", "actions", "remixed", "attached")
UNFINISHED = ("running_video", "running_image", "queued", "queued_from_image", "queued_from_clip", "queued_image")
# Wordings of the earlier release and of this one; the golden files list them as changed.
UNCHANGED = (
    "id status progress prompt size num_frames fps seed created_at completed_at expires_at step num_steps "
    "frames_sha256 remixed_from_video_id"
).split()
DEADLINE_S = 200.0
CLOSE_LEVELS = 1.0


# Schema of a database -> the commit that wrote it.
COMMITS = {"0001": "35475f6", "0002": "35475f6", "0003": "2b9fe1e"}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Schema -> the unpacked fixture with databases of it; read-only."""
    places = {}
    for commit in set(COMMITS.values()):
        places[commit] = tmp_path_factory.mktemp(commit)
        with tarfile.open(FIXTURES / f"{commit}.tar.xz") as archive:
            archive.extractall(places[commit], filter="data")
    return {schema: places[commit] for schema, commit in COMMITS.items()}


class OldRun:
    """A copy of one run of the earlier release."""

    def __init__(self, place: Path, url: str, schema: str) -> None:
        self.place, self.url = place, url
        # There were no attached jobs before.
        self.has_attached = schema != "0001"
        self.manifest: dict[str, Any] = json.loads((place / "manifest.json").read_text())
        self.jobs: dict[str, dict[str, Any]] = self.manifest["jobs"]

    @classmethod
    def copy(cls, run: Path, place: Path, database: str) -> OldRun:
        """Copy a run with a SQLite database, such as ``0002.sqlite3``."""
        shutil.copytree(run, place)
        return cls(place, f"sqlite:///{place}/{database}", database[:4])

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.manifest['keys'][key]['text']}"}

    def copies(self, job: dict[str, Any]) -> list[Path]:
        """Return the places of a job's finished file, in the directory and the archive."""
        sha256 = job["contents"]["video"]["sha256"]
        paths = self.place.rglob("clip.*")
        return [path for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() == sha256]

    def config(self, checkpoint: Path) -> AppConfig:
        archive = self.place / "archive"
        overrides = {
            "media__archive": f"file://{archive}" if archive.exists() else None,
            "media__keep_s": 3e9,
            "jobs__database": self.url,
            "jobs__keep_s": 3e9,
            "jobs__lease_s": 60,  # a runner on a slow machine keeps its jobs
            "auth__enabled": True,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        return app_config(checkpoint, self.place / "media", "earlier", given)

    def start(self, loop: Loop, checkpoint: Path) -> InProcessApp:
        return InProcessApp(loop, "earlier", self.config(checkpoint))


@pytest.fixture(params=["directory", "archive"])
def run(request: pytest.FixtureRequest) -> str:
    """The run that had an archive, or the one without."""
    return str(request.param)


FAST_DATABASE = "0002.sqlite3"
# With files in the old layout, and in today's.
OLD_DATABASES = (FAST_DATABASE, "0001.sqlite3", "0001.sql", "0002.sql")
DATABASES = (*OLD_DATABASES, "0003.sqlite3", "0003.sql")


def slow_unless(is_fast: bool, value: str) -> Any:
    return pytest.param(value, marks=[] if is_fast else [pytest.mark.slow])


@contextmanager
def copy_run(name: str, database: str, place: Path, request: pytest.FixtureRequest) -> Iterator[OldRun]:
    """Copy a run, with a database of one kind and schema, for the time of the block."""
    run = request.getfixturevalue("unpacked")[database[:4]] / name
    if database.endswith(".sqlite3"):
        yield OldRun.copy(run, place, database)
        return
    shutil.copytree(run, place)
    with fresh_database(request.getfixturevalue("postgres_url")) as url:
        load_dump(url, place / database)
        yield OldRun(place, url, database[:4])


@pytest.fixture(params=[slow_unless(it == FAST_DATABASE, it) for it in OLD_DATABASES])
def old_run(request: pytest.FixtureRequest, run: str, tmp_path: Path) -> Iterator[OldRun]:
    """A run for one test."""
    with copy_run(run, request.param, tmp_path / run, request) as old_run:
        yield old_run


@dataclass(frozen=True)
class ServedRun:
    """A run that this release serves, and a client of it."""

    old_run: OldRun
    app: InProcessApp
    http: httpx2.Client


# What differs with an archive is in every run in the tests of moving, and of a directory that was lost.
@pytest.fixture(
    scope="module",
    params=[
        slow_unless(run == "directory" and database in (FAST_DATABASE, "0003.sqlite3"), f"{run}/{database}")
        for run in ("directory", "archive")
        for database in DATABASES
    ],
)
def served_run(
    request: pytest.FixtureRequest,
    loop: Loop,
    tiny_nano: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServedRun]:
    """A run whose jobs run once for all tests that read it."""
    run, database = request.param.split("/")
    with copy_run(run, database, tmp_path_factory.mktemp("opened") / run, request) as old_run:
        app = old_run.start(loop, tiny_nano)
        with httpx2.Client(base_url=app.url, timeout=DEADLINE_S, headers=old_run.headers("team")) as http:
            yield ServedRun(old_run, app, http)
        app.close()


def test_the_checkpoint_is_that_of_the_fixtures(unpacked: dict[str, Path], tiny_nano: Path) -> None:
    weights = hashlib.sha256()
    for path in sorted(tiny_nano.rglob("*")):
        if path.is_file():
            weights.update(path.relative_to(tiny_nano).as_posix().encode() + path.read_bytes())
    known = {(place / "checkpoint.sha256").read_text().strip() for place in unpacked.values()}
    assert known == {weights.hexdigest()}


def test_every_job_ends_and_every_file_is_served(served_run: ServedRun) -> None:
    """Half-denoised jobs resume from their states, with the results of the earlier release."""
    http, old_run = served_run.http, served_run.old_run
    for name in COMPLETED:
        if name != "attached" or old_run.has_attached:
            job = http.get(f"/v1/videos/{old_run.jobs[name]['id']}").json()
            check_video(job, old_run.jobs[name]["object"], old_run)
            check_contents(http, old_run.jobs[name])
            assert [kind for _, kind, _ in events_of(http, job["id"])][-1] == "completed"
    for name in ("failed", "cancelled_running", "cancelled_waiting"):
        job = http.get(f"/v1/videos/{old_run.jobs[name]['id']}").json()
        check_video(job, old_run.jobs[name]["object"], old_run)
        assert job["error"] == old_run.jobs[name]["object"]["error"]
    for name in UNFINISHED:
        job = wait_for_end(http, old_run.jobs[name]["id"])
        assert job["status"] == "completed", (name, job["error"])
        check_frames(http, job, old_run.jobs[name])
        events = [(kind, data) for _, kind, data in events_of(http, job["id"])]
        begun = [index for index, (kind, _) in enumerate(events) if kind == "started"]
        first, *_ = [data["step"] for kind, data in events[begun[-1] :] if kind == "step"]
        assert (len(begun), first > 1) == ((2, True) if name.startswith("running") else (1, False)), "from its state on"


def test_keys_idempotency_remix_and_delete_work_on_old_data(served_run: ServedRun) -> None:
    """API keys, idempotency keys, a job to be remixed, a job to be deleted."""
    http, app, old_run = served_run.http, served_run.app, served_run.old_run
    once = old_run.jobs["sound"]
    body = {**once["fields"], "prompt": "A red car."}
    again = http.post("/v1/videos", json=body, headers={"idempotency-key": "once"})
    assert (again.status_code, again.json()["id"]) == (200, once["id"])
    remixed = http.post(f"/v1/videos/{old_run.jobs['from_image']['id']}/remix", json={"prompt": "A blue car."})
    assert remixed.status_code == 200, remixed.text
    known = old_run.jobs["remixed"]
    check_frames(http, wait_for_end(http, remixed.json()["id"]), known)
    assert measure_difference(http, remixed.json()["id"], known["id"]) < CLOSE_LEVELS
    for key, status in (("small", 404), ("revoked", 401)):
        answer = httpx2.get(f"{app.url}/v1/videos/{once['id']}", headers=old_run.headers(key))
        assert answer.status_code == status
    assert old_run.copies(once)
    assert http.delete(f"/v1/videos/{once['id']}").status_code == 200
    assert http.get(f"/v1/videos/{once['id']}/content").status_code == 404
    assert old_run.copies(once) == []


def is_known(path: Path, place: Path) -> bool:
    """Whether a file is a job's, or has a temporary name."""
    name = path.relative_to(place).parts[0]
    return name.startswith(".") or JOB_ID.fullmatch(name) is not None


def check_everything_is_moved(old_run: OldRun, service: JobService) -> None:
    """Check that directory and archive have only folders of known jobs, with all their bytes."""
    unknown = (
        [] if old_run.has_attached else [old_run.jobs["attached"]]
    )  # a job that the database of 0001 does not have
    for place in filter(Path.exists, (old_run.place / "media", old_run.place / "archive")):
        # A killed start may leave an empty folder, and a temporary name, which is swept by its age.
        others = {path.parent for path in place.rglob("*") if path.is_file() and not is_known(path, place)}
        clips = [hashlib.sha256(clip.read_bytes()).hexdigest() for path in others for clip in path.glob("clip.*")]
        assert clips == [job["contents"]["video"]["sha256"] for job in unknown]
        assert len(others) == len(unknown)
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in old_run.place.rglob("*") if path.is_file()}
    assert set(old_run.manifest["files"].values()) <= found
    for name in COMPLETED:
        known = old_run.jobs[name]
        job = service.store.get(known["id"])
        if (name == "attached" and not old_run.has_attached) or "video" not in known["contents"]:
            continue
        assert job is not None
        assert (
            hashlib.sha256(service.media.read(service.media.require(job.media_id))).hexdigest()
            == known["contents"]["video"]["sha256"]
        )
    for name in UNFINISHED:
        job = service.store.get(old_run.jobs[name]["id"])
        assert job is not None
        assert all(service.files.exists(job.job_id, name) for name in job.inputs)
        assert service.files.exists(job.job_id, SAVED_STATE) == name.startswith("running")


def test_no_file_stays_in_the_old_layout(old_run: OldRun, tiny_nano: Path) -> None:
    with closing(JobService.open(old_run.config(tiny_nano)).store):
        pass
    service = JobService.open(old_run.config(tiny_nano))
    with closing(service.store):
        check_everything_is_moved(old_run, service)


def kill_at_every_step(run: Path, database: str, place: Path, checkpoint: Path, stride: int) -> int:
    """Kill a start at each ``stride``-th step of the upgrade of a fresh copy, then start again; return their number."""
    for step in itertools.count(1, stride):
        old_run = OldRun.copy(run, place / str(step), database)
        is_killed = is_killed_at(step, lambda old_run=old_run: JobService.open(old_run.config(checkpoint)))
        service = JobService.open(old_run.config(checkpoint))
        with closing(service.store):
            check_everything_is_moved(old_run, service)
        shutil.rmtree(old_run.place)
        if not is_killed:
            return step // stride
    raise AssertionError("unreachable")


@pytest.mark.parametrize("database", ["0001.sqlite3", "0002.sqlite3"])
@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_start_that_is_killed_at_any_step_loses_nothing(
    run: str, database: str, stride: int, unpacked: dict[str, Path], tiny_nano: Path, tmp_path: Path
) -> None:
    """Steps of the database's upgrade, and of the files' after it."""
    given = (unpacked[database[:4]] / run, database, tmp_path, tiny_nano, stride)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fork needs a process with one thread
        assert pool.submit(kill_at_every_step, *given).result(1700) >= 100 // stride


def test_two_starts_at_once_move_everything(old_run: OldRun, tiny_nano: Path) -> None:
    config = old_run.config(tiny_nano)
    with ThreadPoolExecutor(2) as pool:
        services = [each.result(DEADLINE_S) for each in [pool.submit(JobService.open, config) for _ in range(2)]]
    for name in ("sound", "image", "from_clip"):
        known = old_run.jobs[name]
        job = services[0].store.get(known["id"])
        assert job is not None
        assert (
            hashlib.sha256(services[1].media.read(services[1].media.require(job.media_id))).hexdigest()
            == known["contents"]["video"]["sha256"]
        )
    for service in services:
        service.store.close()


def test_while_an_earlier_director_runs_a_job_nothing_is_touched(old_run: OldRun, tiny_nano: Path) -> None:
    engine = sqlalchemy.create_engine(old_run.url)
    with engine.begin() as connection:
        until_s = {"until_s": time.time() + 60}
        connection.execute(text("UPDATE jobs SET lease_until_s = :until_s WHERE state = 'in_progress'"), until_s)
    with pytest.raises(JobsError, match=r"no runner of an earlier release may be at work.*got 2 jobs.*stop"):
        JobService.open(old_run.config(tiny_nano))
    files = {
        path: hashlib.sha256((old_run.place / path).read_bytes()).hexdigest() for path in old_run.manifest["files"]
    }
    assert files == old_run.manifest["files"]
    with engine.begin() as connection:
        connection.execute(text("SELECT seen_s FROM runners" if old_run.has_attached else "SELECT 1"))
        connection.execute(text("UPDATE jobs SET lease_until_s = 5"))
    engine.dispose()
    JobService.open(old_run.config(tiny_nano)).store.close()


def test_files_are_served_where_the_directory_was_lost(
    run: str, unpacked: dict[str, Path], loop: Loop, tiny_nano: Path, tmp_path: Path
) -> None:
    """A new machine has the same archive; without one the files have expired."""
    place = tmp_path / run
    shutil.copytree(unpacked["0002"] / run, place)
    for folder in (place / "media").iterdir():
        if run == "archive" or folder.name != "jobs":
            shutil.rmtree(folder)
    old_run = OldRun(place, f"sqlite:///{place}/0002.sqlite3", "0002")
    app = old_run.start(loop, tiny_nano)
    try:
        with httpx2.Client(base_url=app.url, timeout=DEADLINE_S, headers=old_run.headers("team")) as http:
            if run == "archive":
                check_contents(http, old_run.jobs["sound"])
                assert wait_for_end(http, old_run.jobs["running_image"]["id"])["status"] == "completed"
            else:
                assert http.get(f"/v1/videos/{old_run.jobs['sound']['id']}/content").status_code == 410
    finally:
        app.close()


def check_video(job: dict[str, Any], known: dict[str, Any], old_run: OldRun) -> None:
    """Check that a job's object is that of the earlier release."""
    fields = [name for name in UNCHANGED if old_run.has_attached or name != "remixed_from_video_id"]
    assert {name: job[name] for name in fields} == {name: known[name] for name in fields}


def check_frames(http: httpx2.Client, job: dict[str, Any], known: dict[str, Any]) -> None:
    """Check that a job has the earlier release's results, to the bit.

    Another kind of processor adds in another order. There its frames are close to those of the same request, run whole
    by this release.
    """
    if job["frames_sha256"] == known["object"]["frames_sha256"]:
        return check_contents(http, known)
    again = http.post(f"/v1/videos/{job['id']}/remix", json={"prompt": job["prompt"]})
    whole = wait_for_end(http, again.json()["id"])
    assert whole["status"] == "completed"
    assert measure_difference(http, job["id"], whole["id"]) < CLOSE_LEVELS
    return None


def measure_difference(http: httpx2.Client, job_id: str, other_id: str) -> float:
    """Return the mean difference of two results' frames, in levels of 255."""
    frames = []
    for name in (job_id, other_id):
        with tempfile.NamedTemporaryFile() as file:
            file.write(http.get(f"/v1/videos/{name}/content").content)
            file.flush()
            frames.append(np.stack(list(read_frames(Path(file.name)))).astype(np.float32))
    return float(np.abs(frames[0] - frames[1]).mean())


def check_contents(http: httpx2.Client, known: dict[str, Any]) -> None:
    """Check that every old variant is served byte for byte."""
    for variant, facts in known["contents"].items():
        answer = http.get(f"/v1/videos/{known['id']}/content", params={"variant": variant})
        assert answer.status_code == 200, (variant, answer.text)
        assert answer.headers["content-type"] == facts["media_type"]
        assert hashlib.sha256(answer.content).hexdigest() == facts["sha256"], variant
