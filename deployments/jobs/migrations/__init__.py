"""The migrations of the database, and how to run them; each file of ``versions`` leads from the schema before it.

There is no ini file: Alembic gets the connection from here.
"""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from deployments.errors import JobsError
from deployments.jobs.schema import VERSION_TABLE

# Alembic keeps the running upgrade in a global of its own.
_ONE_AT_A_TIME = threading.Lock()


def is_current(connection: Connection, name: str) -> bool:
    """Return whether the schema is this release's; raise JobsError, with the database's ``name``, for a newer one."""
    scripts = ScriptDirectory.from_config(_config(connection))
    found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    newest = scripts.get_current_head()
    if found not in {None, *(script.revision for script in scripts.walk_revisions())}:
        raise JobsError(
            f"the database of jobs {name} has the schema {found} of a newer release; this one knows those up to "
            f"{newest}. Start the newer release, or set jobs.database to another database"
        )
    return found == newest


def upgrade(connection: Connection, to: str = "head") -> None:
    """Run the missing migrations up to ``to`` in the connection's transaction, which must exclude all others."""
    with _ONE_AT_A_TIME:
        command.upgrade(_config(connection), to)


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
