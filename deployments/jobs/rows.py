"""Find and change jobs in the database.

A job changes in :func:`change_job` and nowhere else (only its lease is renewed elsewhere, in one statement): as
:data:`deployments.jobs.job.TRANSITIONS` allows, only if its state and lease are still the same, and together with its
events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from sqlalchemy import JSON, BigInteger, Connection, Row, Select, Table, bindparam, cast, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from deployments.errors import IllegalTransition, LeaseLost, TooManyEvents
from deployments.jobs.job import TRANSITIONS, Job, JobEvent, JobState, Lane, NewJob, Outcome
from deployments.jobs.schema import JOB_EVENTS, JOBS

MAX_EVENTS = 10_000
"""Most events of a job before its last: 1000 steps and 1201 chunks of three runners, and a preview a step."""

Event = tuple[str, Mapping[str, Any]]
"""Kind and data of an event that is about to be inserted."""

_TUPLES = ("inputs", "notes", "warnings")
_FIND = select(JOBS).where(JOBS.c.job_id == bindparam("wanted"))
_FIND_TO_CHANGE = _FIND.with_for_update()
_FIELDS = tuple(field.name for field in fields(Job))


def job_of(row: Row[Any]) -> Job:
    """Return the job that a row of the table holds."""
    values = dict(row._mapping)
    values["order"], values["media_id"] = values.pop("queue_order"), values.pop("media_path")
    values |= {name: tuple(values[name]) for name in _TUPLES}
    values |= {"lane": Lane(values["lane"]), "state": JobState(values["state"])}
    return Job(**values)


def _columns(job: Job) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in _FIELDS}
    values["queue_order"], values["media_path"] = values.pop("order"), values.pop("media_id")
    values |= {name: list(values[name]) for name in _TUPLES}
    values |= {"request": dict(job.request), "result": dict(job.result)}
    return values | {"lane": job.lane.value, "state": job.state.value}


def insert_job(connection: Connection, new: NewJob, order: float, now_s: float) -> Job:
    """Insert a new job, queued."""
    given = {field.name: getattr(new, field.name) for field in fields(NewJob)}
    job = Job(**given, order=order, created_s=now_s, updated_s=now_s)
    connection.execute(insert(JOBS), _columns(job))
    return job


def find_job(connection: Connection, job_id: str, owner: str | None, *, to_change: bool = False) -> Job | None:
    """Return a job, locked until the transaction ends if it is ``to_change``.

    None if there is no such job, or it is not the ``owner``'s (None = any owner).
    """
    row = connection.execute(_FIND_TO_CHANGE if to_change else _FIND, {"wanted": job_id}).one_or_none()
    return None if row is None or owner not in (None, row.owner) else job_of(row)


def find_leased(connection: Connection, job_id: str, lease: str) -> Job:
    """Return and lock the job in progress under a lease; raise LeaseLost if there is none."""
    job = find_job(connection, job_id, None, to_change=True)
    if job is None or job.state is not JobState.IN_PROGRESS or not lease or job.lease != lease:
        raise LeaseLost(job_id)
    return job


def change_job(
    connection: Connection, job: Job, state: JobState, now_s: float, events: Sequence[Event] = (), **changes: Any
) -> Job:
    """Change a job, as found in this transaction, and return it in its next state, which may be the same.

    Raises:
        IllegalTransition: the state must not follow the job's.
        LeaseLost: another process has changed the job.
        TooManyEvents: it has too many.
    """
    if state not in TRANSITIONS[job.state]:
        raise IllegalTransition(job.job_id, job.state, state)
    last_seq = job.last_seq + len(events)
    if last_seq > MAX_EVENTS + state.is_final:
        raise TooManyEvents(f"{job.job_id} has {job.last_seq} events; at most {MAX_EVENTS} are kept of one job")
    changed = replace(job, state=state, updated_s=now_s, last_seq=last_seq, **changes)
    before, after = _columns(job), _columns(changed)
    values = {name: value for name, value in after.items() if value != before[name]}
    as_found = (JOBS.c.job_id == job.job_id, JOBS.c.state == job.state.value, JOBS.c.lease == job.lease)
    if values and connection.execute(update(JOBS).where(*as_found).values(values)).rowcount != 1:
        raise LeaseLost(job.job_id)
    if events:
        rows = [
            {"job_id": job.job_id, "seq": seq, "kind": kind, "data": dict(data), "at_s": now_s}
            for seq, (kind, data) in enumerate(events, start=job.last_seq + 1)
        ]
        connection.execute(insert(JOB_EVENTS), rows)
    return changed


def end_job(connection: Connection, job: Job, outcome: Outcome, now_s: float, keep_media_s: float | None = None) -> Job:
    """End a job with its last event, as :func:`change_job` does, and return it; its file stays for ``keep_media_s``."""
    assert outcome.state.is_final, "an end is final"
    is_completed = outcome.state is JobState.COMPLETED
    data = {} if is_completed else {"code": outcome.error_code, "message": outcome.error_message}
    return change_job(
        connection,
        job,
        outcome.state,
        now_s,
        [(outcome.state.value, data)],
        completed_s=now_s,
        expires_s=now_s + keep_media_s if is_completed and keep_media_s is not None else None,
        result=dict(outcome.result),
        error_code=outcome.error_code,
        error_message=outcome.error_message,
        stage=outcome.state.value,
        lease="",
        lease_until_s=0.0,
        is_cancelling=False,
    )


def find_events(connection: Connection, cursors: Mapping[str, int], limit: int) -> list[JobEvent]:
    """Return at most ``limit`` events of several jobs, in order, each after the number that ``cursors`` has for it."""
    query = _later_events(connection.dialect.name == "sqlite")
    found = connection.execute(query, {"cursors": dict(cursors), "most": limit})
    return [JobEvent(**row._mapping) for row in found]


@cache
def _later_events(is_sqlite: bool) -> Select[*tuple[Any, ...]]:
    """Build the query, in which all cursors are one parameter."""
    unfold = func.json_each if is_sqlite else func.json_each_text
    cursors = unfold(bindparam("cursors", type_=JSON)).table_valued("key", "value")
    return (
        select(JOB_EVENTS)
        .join(cursors, JOB_EVENTS.c.job_id == cursors.c.key)
        .where(JOB_EVENTS.c.seq > cast(cursors.c.value, BigInteger))
        .order_by(JOB_EVENTS.c.job_id, JOB_EVENTS.c.seq)
        .limit(bindparam("most"))
    )


def upsert(connection: Connection, table: Table, **values: Any) -> None:
    """Insert a row, or update the row of the same primary key."""
    keys = [column.name for column in table.primary_key]
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(table).values(values)
    others = {name: value for name, value in values.items() if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=others))
