"""Keeps Ray's token from other users: a process with it runs code as this user, and Ray writes it readable for all."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from cosmos3_core.errors import Cosmos3Error

# Where Ray looks for it if the environment names no other.
_NAME = Path(".ray", "auth_token")


class TokenError(Cosmos3Error):
    """Ray's token cannot be kept from other users; the message says why."""


def protect_token(home: Path) -> None:
    """Make the token of a user's Ray, if there is none, and let this user alone read it; raise TokenError.

    Two starts at once end up with the same one.
    """
    path = home / _NAME
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.parent.chmod(0o700)
        if not path.exists():
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as made:  # for this user alone
                made.write(secrets.token_hex(32))
                made.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(made.name, path)
        path.chmod(0o600)
    except OSError as error:
        raise TokenError(f"{path} must be a file that this user alone can read: {error}") from None
