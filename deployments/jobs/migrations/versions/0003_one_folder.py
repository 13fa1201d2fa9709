"""Media ids that say where a file lies: in the folder of its job, see :mod:`deployments.media.layout`.

The files themselves are moved by the first process that opens the media store (:mod:`deployments.media.old_layout`).
Processes of an earlier release use the old places. So none may hold a lease now, and afterwards the renamed columns
keep them from renewing one, and from accepting or claiming jobs.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

from deployments.errors import JobsError

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Rename the columns and the media ids; raise JobsError while a runner of an earlier release is at work."""
    now_s = time.time()
    held = sa.text(
        "SELECT count(*), max(lease_until_s) FROM jobs WHERE state = 'in_progress' AND lease_until_s > :now_s"
    )
    num_held, until_s = op.get_bind().execute(held, {"now_s": now_s}).one()
    if num_held:
        raise JobsError(
            f"no runner of an earlier release may be at work while its database is upgraded (got {num_held} jobs under "
            f"a lease, for up to {until_s - now_s:.0f} s more); stop the earlier release, then start this one again"
        )
    op.execute("ALTER TABLE runners RENAME COLUMN seen_s TO alive_s")
    op.execute("ALTER TABLE jobs RENAME COLUMN media_id TO media_path")
    op.execute("UPDATE jobs SET media_path = job_id || '/' || media_path WHERE media_path != ''")
