"""API keys: their classes, limits and secrets.

A key's text is shown once, when it is made. The database holds the SHA-256 of its secret part: 256 random
bits cannot be guessed, so no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Row, func, insert, select, update

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from deployments.errors import JobsError
from deployments.jobs.database import Database
from deployments.jobs.schema import API_KEYS

MAX_KEYS = 10_000
"""Most keys that are valid at one time."""

_TEXT = re.compile(r"c3_(?P<key_id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})", re.ASCII)
_SECRET_BYTES = 32
_MAX_NAME_CHARS = 200
_MAX_LIMIT = 1_000_000
# Used for a text that is no key, so that every rejection takes the same work.
_NO_ID, _NO_SECRET, _NO_HASH = "none", "none", "0" * 64


@dataclass(frozen=True)
class KeyLimits:
    """Bounds of one key's queued and running jobs in each lane; None = the configuration's."""

    max_queued: int | None = None
    max_running: int | None = None


@dataclass(frozen=True, kw_only=True)
class NewKey:
    """A key that is about to be made.

    Attributes:
        name: of its owner, for people.
        service_class: of requests that name none.
        allowed_classes: that requests may name; ``service_class`` is always among them.
    """

    name: str
    service_class: str = "standard"
    allowed_classes: tuple[str, ...] = ()
    limits: KeyLimits = KeyLimits()


@dataclass(frozen=True, kw_only=True)
class ApiKey(NewKey):
    """A key as it is in the database.

    Attributes:
        key_id: owner of its jobs.
        created_s: seconds since 1970.
        revoked_s: when it was revoked; None while it is valid.
        secret_sha256: of the secret part of its text, hexadecimal.
    """

    key_id: str
    created_s: float
    revoked_s: float | None = None
    secret_sha256: str = field(repr=False)


class KeyStore:
    """The keys in a database, for any number of threads and processes; ``clock`` gives seconds since 1970.

    Every method raises ``JobsError`` if the database fails.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @classmethod
    def open(cls, url: str, clock: Callable[[], float] = time.time) -> KeyStore:
        """Open the keys in a database, as :class:`deployments.jobs.database.Database`."""
        return cls(Database(url), clock)

    def close(self) -> None:
        """Close its connections."""
        self._database.close()

    def create(self, new: NewKey) -> tuple[ApiKey, str]:
        """Make a key; return it with its text, which cannot be shown again.

        Raise RequestError if a value is out of range or a valid key has that name, JobsError if there are too many.
        """
        checks.text("name", new.name, _MAX_NAME_CHARS, may_be_empty=False)
        if not new.name.isprintable():
            raise RequestError("name", new.name, "one line of printable characters")
        for name in ("max_queued", "max_running"):
            if (limit := getattr(new.limits, name)) is not None:
                checks.integer(name, limit, 1, _MAX_LIMIT)
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        key = ApiKey(
            name=new.name,
            service_class=new.service_class,
            allowed_classes=tuple(dict.fromkeys((new.service_class, *new.allowed_classes))),
            limits=new.limits,
            key_id=secrets.token_hex(8),
            created_s=self._clock(),
            secret_sha256=_hash(secret),
        )
        with self._database.writing() as connection:
            is_valid = API_KEYS.c.revoked_s.is_(None)
            if connection.execute(select(API_KEYS.c.key_id).where(is_valid, API_KEYS.c.name == new.name)).first():
                raise RequestError("name", new.name, "a name that no valid key has", "Remove that one first.")
            if connection.execute(select(func.count()).select_from(API_KEYS).where(is_valid)).scalar_one() >= MAX_KEYS:
                raise JobsError(f"at most {MAX_KEYS} keys may be valid at one time; revoke one first")
            connection.execute(insert(API_KEYS).values(_columns(key)))
        return key, f"c3_{key.key_id}_{secret}"

    def verify(self, text: str) -> ApiKey | None:
        """Return the valid key of a text, or None.

        Every rejection takes the same work: a malformed text, an unknown or revoked key, a wrong secret.
        """
        parts = _TEXT.fullmatch(text)
        key_id, secret = (parts["key_id"], parts["secret"]) if parts else (_NO_ID, _NO_SECRET)
        with self._database.reading() as connection:
            row = connection.execute(select(API_KEYS).where(API_KEYS.c.key_id == key_id)).one_or_none()
        is_right = hmac.compare_digest(_hash(secret), _NO_HASH if row is None else row.secret_sha256)
        if row is None or not is_right or row.revoked_s is not None:
            return None
        return _key_of(row)

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, revoked ones too, the oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(API_KEYS).order_by(API_KEYS.c.created_s, API_KEYS.c.key_id)).all()
        return tuple(_key_of(row) for row in rows)

    def revoke(self, key: str) -> ApiKey:
        """Revoke the key of an id, which may be revoked already, or the valid key of a name; its jobs stay.

        Raise RequestError if there is no such key, or several have that name, as earlier releases allowed.
        """
        has_name = (API_KEYS.c.name == key) & API_KEYS.c.revoked_s.is_(None)
        with self._database.writing() as connection:
            found = connection.execute(select(API_KEYS.c.key_id).where((API_KEYS.c.key_id == key) | has_name)).scalars()
            ids = sorted(found)
            if key in ids:
                ids = [key]
            if len(ids) != 1:
                hint = f"{' and '.join(ids)} have that name." if ids else "`cosmos3 keys list` shows them."
                raise RequestError("key", key, "the id of a key, or the name of a valid one", hint)
            this = API_KEYS.c.key_id == ids[0]
            still_valid = this & API_KEYS.c.revoked_s.is_(None)
            connection.execute(update(API_KEYS).where(still_valid).values(revoked_s=self._clock()))
            return _key_of(connection.execute(select(API_KEYS).where(this)).one())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _columns(key: ApiKey) -> dict[str, Any]:
    values = asdict(key)
    limits = values.pop("limits")
    return values | limits | {"allowed_classes": list(key.allowed_classes)}


def _key_of(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    limits = KeyLimits(values.pop("max_queued"), values.pop("max_running"))
    return ApiKey(**values | {"limits": limits, "allowed_classes": tuple(values["allowed_classes"])})
