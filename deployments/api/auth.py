"""API keys of requests, checked. Where keys are off, all callers are the same one."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.datastructures import Headers

from cluster.errors import OverloadedError
from cosmos3_core.errors import Cosmos3Error
from deployments.config import DEFAULT_CLASS
from deployments.errors import ApiError
from deployments.jobs.keys import ApiKey, KeyLimits, KeyStore
from deployments.threads import run_in_thread

_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([\x21-\x7e]{1,256})")
# How long a key that was revoked is still let in, and one that was just made may be refused.
_CACHE_S = 5.0
_MAX_CACHED = 4096
# Looks into the database at a time, and callers who wait for theirs: whoever guesses keys takes no more threads.
_MAX_LOOKS = 4
_MAX_WAITING = 64
_RETRY_S = 1.0
_REFUSED = {"www-authenticate": "Bearer"}


LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What browsers of this machine call it."""


@dataclass(frozen=True)
class Caller:
    """Sender of a request.

    Attributes:
        owner: id of the key, "" where keys are off.
        limits: the key's own; None: the configuration's.
        service_class: of requests that name none.
        classes: that it may wait in; None: any of the configuration's.
    """

    owner: str = ""
    limits: KeyLimits | None = None
    service_class: str = DEFAULT_CLASS
    classes: tuple[str, ...] | None = None


def auth_required(configured: bool | None, host: str) -> bool:
    """Return whether requests need a key.

    Args:
        configured: ``auth.enabled``; None: where others than this machine reach the port.
        host: that the port is opened at.
    """
    return not is_loopback(host) if configured is None else configured


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address. A name other than localhost may lead to any."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str, allowed: tuple[str, ...], *, needs_keys: bool) -> frozenset[str] | None:
    """Return the names that a header Host may have, in lower case and without a port; None: any.

    Without keys, a page whose name has been made to lead here would be let in as one of this machine's own.

    Args:
        host: that the port is opened at.
        allowed: ``http.allowed_hosts``.
        needs_keys: whether requests need one.
    """
    if needs_keys or not is_loopback(host):
        return None
    own = f"[{host}]" if ":" in host else host
    return LOOPBACK_HOSTS | {name.lower() for name in (own, *allowed)}


class NoKeys(Cosmos3Error):
    """Requests need a key, and none exists; the message says what to do."""


def check_keys(keys: KeyStore, host: str) -> None:
    """Check that an app that asks for keys has at least one.

    Args:
        keys: of its database.
        host: that it listens at.

    Raises:
        NoKeys: there is none, or all are revoked.
        JobsError: the database cannot be used.
    """
    if all(key.revoked_s is not None for key in keys.list()):
        raise NoKeys(
            f"requests need an API key where http.host={host}, and there is none. Make one with `cosmos3 keys add "
            "NAME` and the same --config and --set; or let in whoever reaches the port, with --set auth.enabled=false"
        )


class Authenticator:
    """Checker of keys, with a cache of the last seconds.

    Args:
        keys: of the database.
        clock: seconds that only grow.
    """

    def __init__(self, keys: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        # Apart, so that guesses drive out no keys. By hash: no secret stays in memory.
        self._known: _Recent[Caller] = _Recent(clock)
        self._unknown: _Recent[None] = _Recent(clock)
        self._looks = asyncio.Semaphore(_MAX_LOOKS)
        self._num_waiting = 0

    async def caller(self, headers: Headers) -> Caller:
        """Return who sends a request.

        Args:
            headers: of the request.

        Raises:
            ApiError: 401, there is no valid key in them.
            OverloadedError: too many keys are looked up just now.
            JobsError: the database cannot be used.
        """
        given = headers.getlist("authorization")
        match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise ApiError(401, "no_api_key", "this needs one header Authorization: Bearer KEY", _REFUSED)
        digest = hashlib.sha256(match[1].encode()).digest()
        if (caller := self._known.get(digest)) is not None:
            return caller
        key = None if self._unknown.has(digest) else await self._found(match[1])
        if key is None:
            if not self._unknown.has(digest):
                self._unknown.put(digest, None)
            raise ApiError(401, "wrong_api_key", "this API key is not known, or not any more", _REFUSED)
        caller = Caller(key.key_id, key.limits, key.service_class, key.allowed_classes)
        self._known.put(digest, caller)
        return caller

    async def _found(self, secret: str) -> ApiKey | None:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError("API keys that are looked up", _MAX_WAITING, _RETRY_S)
        self._num_waiting += 1
        try:
            async with self._looks:
                return await run_in_thread(self._keys.verify, secret)
        finally:
            self._num_waiting -= 1


V = TypeVar("V")


class _Recent(Generic[V]):
    """Cache of the last seconds, by hash; the oldest entry is evicted where there are too many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: OrderedDict[bytes, tuple[float, V]] = OrderedDict()

    def put(self, digest: bytes, value: V) -> None:
        self._found.pop(digest, None)
        self._found[digest] = self._clock(), value
        if len(self._found) > _MAX_CACHED:
            self._found.popitem(last=False)

    def has(self, digest: bytes) -> bool:
        found = self._found.get(digest)
        return found is not None and self._clock() - found[0] < _CACHE_S

    def get(self, digest: bytes) -> V | None:
        return self._found[digest][1] if self.has(digest) else None
