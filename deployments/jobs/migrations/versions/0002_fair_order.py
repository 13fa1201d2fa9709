"""Classes, a fair order of queued jobs, attached jobs, previews, remixes, measured speed.

Queued jobs keep their order within each owner: their places are those of standard-class jobs in an empty queue.
"""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Share of the standard class by default.
_WEIGHT = 4.0


def upgrade() -> None:
    """Add the columns and tables, and give queued jobs their places."""
    for column in (
        sa.Column("service_class", sa.Text, nullable=False, server_default="standard"),
        sa.Column("queue_order", sa.Double, nullable=False, server_default=sa.text("0")),
        sa.Column("attached_to", sa.Text),
        sa.Column("step_s", sa.Double),
        sa.Column("previews", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("remixed_from", sa.Text),
        sa.Column("skip_guardrails", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("warnings", sa.JSON, nullable=False, server_default="[]"),
    ):
        op.add_column("jobs", column)
    op.drop_index("jobs_by_queue", "jobs")
    op.create_index("jobs_by_queue", "jobs", ["model", "state", "lane", "queue_order"])
    for column in (
        sa.Column("service_class", sa.Text, nullable=False, server_default="standard"),
        sa.Column("allowed_classes", sa.JSON, nullable=False, server_default='["standard"]'),
    ):
        op.add_column("api_keys", column)
    op.create_table(
        "lanes",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("lane", sa.Text, primary_key=True),
        sa.Column("virtual_time", sa.Double, nullable=False),
    )
    op.create_table(
        "runners",
        sa.Column("runner", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("seen_s", sa.Double, nullable=False),
    )
    op.create_table(
        "rates",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("lane", sa.Text, primary_key=True),
        sa.Column("work_per_s", sa.Double, nullable=False),
        sa.Column("updated_s", sa.Double, nullable=False),
    )
    _give_places()


def _give_places() -> None:
    names = ("job_id", "owner", "model", "lane", "work", "state", "created_s", "queue_order")
    jobs = sa.table("jobs", *(sa.column(name) for name in names))
    connection = op.get_bind()
    waiting = connection.execute(
        sa.select(jobs).where(jobs.c.state == "queued").order_by(jobs.c.created_s, jobs.c.job_id)
    )
    last: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for job in waiting.all():
        last[job.model, job.lane, job.owner] += job.work / _WEIGHT
        place = last[job.model, job.lane, job.owner]
        connection.execute(sa.update(jobs).where(jobs.c.job_id == job.job_id).values(queue_order=place))
