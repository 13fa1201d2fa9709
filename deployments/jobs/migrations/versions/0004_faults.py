"""Jobs that wait until a fault of their surroundings has passed, and what they wait for; the speed of decoding.

Processes of the release before insert jobs without these columns, and claim jobs that should wait: both do no harm.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns."""
    for column in (
        sa.Column("retry_at_s", sa.Double, nullable=False, server_default=sa.text("0")),
        sa.Column("num_faults", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("fault", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("fault_since_s", sa.Double),
    ):
        op.add_column("jobs", column)
    op.add_column("rates", sa.Column("pixels_per_s", sa.Double))
