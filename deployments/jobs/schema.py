"""Tables of the database of jobs, as the newest migration leaves them; see :mod:`deployments.jobs.migrations`.

    jobs        one row a job, see :class:`deployments.jobs.job.Job`
    job_events  their histories
    api_keys    see :mod:`deployments.jobs.keys`
    lanes       virtual time of each lane, see :mod:`deployments.jobs.queue`
    runners     when each runner was last alive
    rates       speed of each lane

Text columns have no length: neither SQLite nor PostgreSQL is faster with one.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
    text,
)

from deployments.jobs.job import JobState

METADATA = MetaData()
NEWEST = "0004"
"""The last of :mod:`deployments.jobs.migrations`, which leaves the tables as they are here."""

VERSION_TABLE = "schema_version"
"""Alembic's table of the last migration, under a name that other programs do not use."""

JOBS = Table(
    "jobs",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("num_frames", Integer, nullable=False),
    Column("fps", Double, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("media_type", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("work", Double, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("notes", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("updated_s", Double, nullable=False),
    Column("started_s", Double),
    Column("completed_s", Double),
    Column("expires_s", Double),
    Column("runner", Text, nullable=False),
    Column("lease", Text, nullable=False),
    Column("lease_until_s", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("is_cancelling", Boolean, nullable=False),
    Column("step", Integer, nullable=False),
    Column("sigma", Double),
    Column("stage", Text, nullable=False),
    # Renamed in 0003, so that an earlier release cannot accept jobs: their files would not be found.
    Column("media_path", Text, nullable=False),
    Column("result", JSON, nullable=False),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("last_seq", Integer, nullable=False),
    # Since 0002; the defaults are for jobs from before.
    Column("service_class", Text, nullable=False, server_default="standard"),
    Column("queue_order", Double, nullable=False, server_default=text("0")),
    Column("attached_to", Text),
    Column("step_s", Double),
    Column("previews", Integer, nullable=False, server_default=text("0")),
    Column("remixed_from", Text),
    Column("skip_guardrails", Boolean, nullable=False, server_default=false()),
    Column("warnings", JSON, nullable=False, server_default="[]"),
    # Since 0004.
    Column("retry_at_s", Double, nullable=False, server_default=text("0")),
    Column("num_faults", Integer, nullable=False, server_default=text("0")),
    Column("fault", Text, nullable=False, server_default=text("''")),
    Column("fault_since_s", Double),
    Index("jobs_by_queue", "model", "state", "lane", "queue_order"),
    Index("jobs_by_owner", "owner", "created_s", "job_id"),
    Index("jobs_by_end", "completed_s"),
    Index("jobs_by_idempotency_key", "owner", "idempotency_key", unique=True),
)

QUEUED, IN_PROGRESS = JobState.QUEUED.value, JobState.IN_PROGRESS.value
"""Values of the column ``state`` of jobs that have not ended."""

QUEUE_ORDER = (JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
"""The order in which queued jobs are claimed."""

JOB_EVENTS = Table(
    "job_events",
    METADATA,
    Column("job_id", Text, ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("at_s", Double, nullable=False),
)

API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("key_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    Column("created_s", Double, nullable=False),
    Column("revoked_s", Double),
    # Since 0002.
    Column("service_class", Text, nullable=False, server_default="standard"),
    Column("allowed_classes", JSON, nullable=False, server_default='["standard"]'),
)

LANES = Table(
    "lanes",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("lane", Text, primary_key=True),
    Column("virtual_time", Double, nullable=False),
)

RUNNERS = Table(
    "runners",
    METADATA,
    Column("runner", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("alive_s", Double, nullable=False),  # renamed in 0003: runners of an earlier release cannot claim
)

RATES = Table(
    "rates",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("lane", Text, primary_key=True),
    Column("work_per_s", Double, nullable=False),
    Column("pixels_per_s", Double),  # since 0004
    Column("updated_s", Double, nullable=False),
)
