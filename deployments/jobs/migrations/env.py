"""Alembic's entry point for an upgrade; see :func:`deployments.jobs.migrations.upgrade`."""

from __future__ import annotations

from alembic import context

from deployments.jobs.schema import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
with context.begin_transaction():  # the caller's
    context.run_migrations()
