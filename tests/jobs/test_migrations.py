"""The database's schema: the newest, upgrades from every earlier one with jobs in it, refusal of a later one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from deployments.errors import JobsError
from deployments.jobs import database, migrations
from deployments.jobs.database import Database
from deployments.jobs.job import JobState, Lane, Outcome, Progress
from deployments.jobs.keys import KeyLimits
from deployments.jobs.migrations import upgrade
from deployments.jobs.schema import METADATA, NEWEST, VERSION_TABLE
from deployments.jobs.store import JobStore
from tests.jobs.making import COMPLETED, LIMITS, claim, claim_existing, list_event_kinds, make_lease, new_job
from tests.jobs.racing import race

# The text of a key from the first release's `keys add`.
OLD_TEXT = "c3_0123456789abcdef_" + "s" * 43
TRY_ID = "0123456789abcdef" * 2
OLD_JOB: dict[str, Any] = {
    "owner": "0123456789abcdef",
    "model": "nano",
    "request": json.dumps({"prompt": "a car", "seed": 5}),
    "inputs": json.dumps(["image.png"]),
    "fingerprint": "f",
    "mode": "text_to_video",
    "prompt": "a car",
    "width": 320,
    "height": 192,
    "num_frames": 17,
    "fps": 24.0,
    "seed": 5,
    "num_steps": 4,
    "media_type": "video/mp4",
    "lane": "video",
    "work": 8.0,
    "request_id": "r",
    "idempotency_key": None,
    "notes": json.dumps(["a note"]),
    "state": "queued",
    "created_s": 1000.0,
    "updated_s": 1000.0,
    "started_s": None,
    "completed_s": None,
    "expires_s": None,
    "runner": "",
    "lease": "",
    "lease_until_s": 0.0,
    "attempts": 0,
    "is_cancelling": False,
    "step": 0,
    "sigma": None,
    "stage": "queued",
    "media_id": "",
    "result": "{}",
    "error_code": "",
    "error_message": "",
    "last_seq": 0,
}


def job_id(number: int) -> str:
    """Return the id of an old job."""
    return f"video_gen_{number:032x}"


def write_old(connection: Connection) -> None:
    """Write the first release's rows: three queued jobs (one of another owner), one running, one completed."""
    columns = ", ".join(["job_id", *OLD_JOB])
    values = ", ".join(f":{name}" for name in ["job_id", *OLD_JOB])
    for number, changes in enumerate(
        [
            {"created_s": 1003.0, "idempotency_key": "late"},
            {"created_s": 1001.0, "work": 80.0},
            {"created_s": 1002.0, "owner": "another"},
            {"state": "in_progress", "runner": "old", "lease": "l", "lease_until_s": 1005.0, "attempts": 1, "step": 2},
            {
                "state": "completed",
                "completed_s": 1010.0,
                "result": json.dumps({"num_bytes": 3}),
                "last_seq": 2,
                "media_id": TRY_ID,
            },
        ]
    ):
        row = {"job_id": job_id(number), **OLD_JOB, **changes}
        connection.execute(text(f"INSERT INTO jobs ({columns}) VALUES ({values})"), row)
    for seq, kind in ((1, "started"), (2, "completed")):
        connection.execute(
            text("INSERT INTO job_events VALUES (:job_id, :seq, :kind, '{}', 1005)"),
            {"job_id": job_id(4), "seq": seq, "kind": kind},
        )
    connection.execute(
        text("INSERT INTO api_keys VALUES (:id, 'old team', :hash, 3, NULL, 900, NULL)"),
        {"id": "0123456789abcdef", "hash": hashlib.sha256(b"s" * 43).hexdigest()},
    )


@pytest.fixture
def old_url(jobs_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a database made and filled by the first release."""
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "upgrade", lambda connection: upgrade(connection, "0001"))
        old = Database(jobs_url)
    with old.writing() as connection:
        write_old(connection)
    old.close()
    return jobs_url


def revision(url: str) -> str:
    """Return the database's schema revision."""
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()
    engine.dispose()
    return str(found)


def test_migrations_end_at_the_tables_of_the_code(jobs_url: str) -> None:
    opened = Database(jobs_url)
    with opened.reading() as connection:
        # PostgreSQL cannot compare two values of JSON.
        options = {"version_table": VERSION_TABLE, "compare_server_default": opened.is_sqlite}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []
    opened.close()


def test_an_upgrade_keeps_jobs_events_and_keys(old_url: str) -> None:
    assert revision(old_url) == "0001"
    store = JobStore.open(old_url)
    assert revision(old_url) == NEWEST
    waiting = store.get(job_id(0))
    assert waiting is not None
    assert (waiting.state, waiting.owner, waiting.lane) == (JobState.QUEUED, "0123456789abcdef", Lane.VIDEO)
    assert (waiting.request, waiting.inputs, waiting.notes) == (
        {"prompt": "a car", "seed": 5},
        ("image.png",),
        ("a note",),
    )
    assert (waiting.service_class, waiting.previews, waiting.warnings, waiting.attached_to) == ("standard", 0, (), None)
    assert (waiting.remixed_from, waiting.skip_guardrails, waiting.step_s) == (None, False, None)
    running = store.get(job_id(3))
    assert running is not None
    assert (running.state, running.lease, running.step, running.attempts) == (JobState.IN_PROGRESS, "l", 2, 1)
    done = store.get(job_id(4))
    assert done is not None
    assert (done.state, done.result, done.completed_s) == (JobState.COMPLETED, {"num_bytes": 3}, 1010.0)
    assert list_event_kinds(store, done) == ["started", "completed"]
    assert (done.media_id, waiting.media_id) == (f"{job_id(4)}/{TRY_ID}", "")
    assert store.find_media_ids() == {TRY_ID: done.media_id}
    key = store.keys.verify(OLD_TEXT)
    assert key is not None
    assert (key.name, key.limits, key.service_class) == ("old team", KeyLimits(3, None), "standard")
    assert key.allowed_classes == ("standard",)
    store.close()


def test_old_and_new_jobs_share_one_fair_order(old_url: str) -> None:
    store = JobStore.open(old_url, clock=lambda: 1004.0)
    new = store.create(new_job(owner="third"), LIMITS)
    own = store.create(new_job(owner="0123456789abcdef"), LIMITS)
    order = []
    while (job := claim(store)) is not None:
        order.append(job.job_id)
    # By work: the new job's 4, the other owner's 8, then the first owner's jobs in order of acceptance.
    assert order == [new.job_id, job_id(2), job_id(1), job_id(0), own.job_id]
    store.close()


def test_an_old_running_job_is_taken_over_and_ends(old_url: str) -> None:
    store = JobStore.open(old_url, clock=lambda: 6e9)
    taken = claim_existing(store)
    assert (taken.job_id, taken.attempts, taken.step) == (job_id(3), 2, 2)
    store.record(make_lease(taken), Progress(step=4, step_s=0.1), [("step", {})])
    assert store.finish(make_lease(taken), COMPLETED, keep_media_s=1).state is JobState.COMPLETED
    assert store.create(new_job(owner="0123456789abcdef", idempotency_key="late"), LIMITS).job_id == job_id(0)
    store.close()


def test_a_second_opening_changes_nothing(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    JobStore.open(old_url).close()
    monkeypatch.setattr(migrations, "upgrade", lambda *_: pytest.fail("it was upgraded again"))
    store = JobStore.open(old_url)
    assert store.cancel(job_id(0)) is not None
    assert Outcome(JobState.FAILED).state is JobState.FAILED
    store.close()


def test_concurrent_upgrades_are_safe(old_url: str) -> None:
    assert race("open", old_url, 0, 2) == ["opened"] * 2
    store = JobStore.open(old_url)
    assert store.get(job_id(0)) is not None
    store.close()


def test_concurrent_creation_is_safe(jobs_url: str) -> None:
    assert race("open", jobs_url, 0, 2) == ["opened"] * 2
    assert revision(jobs_url) == NEWEST


def test_a_failed_upgrade_changes_nothing(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: Connection) -> None:
        upgrade(connection)
        connection.execute(text("SELECT 1 FROM nowhere"))

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "upgrade", fail)
        with pytest.raises(JobsError, match="nowhere"):
            JobStore.open(old_url)
    assert revision(old_url) == "0001"
    store = JobStore.open(old_url)
    assert store.get(job_id(0)) is not None
    store.close()


def test_a_database_in_use_by_an_earlier_release_is_not_upgraded(old_url: str) -> None:
    """A runner of that release would look for files in the old places. Once it stops or dies, its lease expires."""

    def hold(until_s: float) -> None:
        engine = sqlalchemy.create_engine(old_url)
        with engine.begin() as connection:
            held = text("UPDATE jobs SET lease_until_s = :until_s WHERE state = 'in_progress'")
            connection.execute(held, {"until_s": until_s})
        engine.dispose()

    hold(time.time() + 50)
    with pytest.raises(
        JobsError, match=r"no runner of an earlier release may be at work.*got 1 jobs.*(49|50) s more.*stop"
    ):
        JobStore.open(old_url)
    assert revision(old_url) == "0001"
    hold(time.time() - 1)
    JobStore.open(old_url).close()
    assert revision(old_url) == NEWEST


@pytest.mark.parametrize(
    ("column", "statement"),
    [
        ("seen_s", "SELECT EXISTS (SELECT * FROM runners WHERE runner = 'old' AND runners.seen_s > 5)"),
        ("seen_s", "UPDATE runners SET seen_s = 5 WHERE runner = 'old'"),
        ("media_id", "SELECT job_id, media_id FROM jobs"),
        ("media_id", "INSERT INTO jobs (job_id, media_id) VALUES ('new', '')"),
    ],
)
def test_running_processes_of_an_earlier_release_can_change_nothing(old_url: str, column: str, statement: str) -> None:
    """The statement that begins each of their claims, renewals, queries and acceptances fails."""
    JobStore.open(old_url).close()
    engine = sqlalchemy.create_engine(old_url)
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.DBAPIError, match=column):
        connection.execute(text(statement))
    engine.dispose()


def test_a_database_of_a_newer_release_is_refused(jobs_url: str) -> None:
    opened = Database(jobs_url)
    with opened.writing() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0099'"))
    opened.close()
    with pytest.raises(
        JobsError, match=r"schema 0099 of a newer release.*up to 0004\. Start the newer release, or set"
    ):
        JobStore.open(jobs_url)
    assert revision(jobs_url) == "0099"


def test_a_database_of_another_program_is_refused(jobs_url: str) -> None:
    engine = sqlalchemy.create_engine(jobs_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (a INTEGER)"))
    engine.dispose()
    with pytest.raises(JobsError, match="already exists; it holds tables of another program"):
        JobStore.open(jobs_url)


def test_every_migration_comes_with_the_package() -> None:
    """setuptools includes them as modules of packages."""
    from setuptools import find_namespace_packages

    root = Path(database.__file__).parents[2]
    packages = find_namespace_packages(str(root), include=["deployments*"])
    assert {"deployments.jobs.migrations", "deployments.jobs.migrations.versions"} <= set(packages)


def test_the_expected_revision_is_the_newest_migration(jobs_url: str) -> None:
    """Processes that find it in the database do not load Alembic."""
    scripts = sorted(Path(migrations.__file__).parent.glob("versions/0*.py"))
    assert scripts[-1].stem.partition("_")[0] == NEWEST
    JobStore.open(jobs_url).close()
    code = "import sys; from deployments.jobs.store import JobStore; JobStore.open(sys.argv[1])"
    code = f"{code}; print('alembic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, jobs_url], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "False"
