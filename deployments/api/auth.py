"""Check the API keys of requests. Without keys, all callers are the same one."""

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
# How long a revoked key is still accepted, and a new one may be refused.
_CACHE_S = 5.0
_MAX_CACHED = 4096
# Concurrent look-ups in the database, and callers that wait for one: guessed keys take no more threads.
_MAX_LOOKS = 4
_MAX_WAITING = 64
_RETRY_S = 1.0
_CHALLENGE = {"www-authenticate": "Bearer"}

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names by which browsers of this machine call it."""


@dataclass(frozen=True)
class Caller:
    """Sender of a request: its key's id and limits, or the configuration's.

    Attributes:
        owner: id of the key, "" where keys are off.
        service_class: of requests that name none.
        classes: that it may name; None: any.
    """

    owner: str = ""
    limits: KeyLimits | None = None
    service_class: str = DEFAULT_CLASS
    classes: tuple[str, ...] | None = None


def requires_key(configured: bool | None, host: str) -> bool:
    """Return whether requests need a key: as ``auth.enabled`` says, else if other machines reach ``host``."""
    return not is_loopback(host) if configured is None else configured


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address. Any name but localhost may lead elsewhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def list_host_names(host: str, allowed: tuple[str, ...], *, needs_keys: bool) -> frozenset[str] | None:
    """Return the hosts that a Host header may name, in lower case and without a port; None: any.

    Without keys, DNS rebinding would let a foreign page in: one whose name was made to resolve to this machine.
    """
    if needs_keys or not is_loopback(host):
        return None
    own = f"[{host}]" if ":" in host else host
    return LOOPBACK_HOSTS | {name.lower() for name in (own, *allowed)}


class NoKeys(Cosmos3Error):
    """Requests need a key, and none exists; the message says what to do."""


def check_keys(keys: KeyStore, host: str) -> None:
    """Raise NoKeys if an app has no valid key. ``host``, where it listens, is for the message."""
    if all(key.revoked_s is not None for key in keys.list()):
        raise NoKeys(
            f"requests need an API key where http.host={host}, and there is none. Make one with `cosmos3 keys add "
            "NAME` and the same --config and --set; or let in all who reach the port, with --set auth.enabled=false"
        )


class Authenticator:
    """Checks keys against the database, with a cache of a few seconds."""

    def __init__(self, keys: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        # Two caches, so that guesses evict no keys. By hash, so that no secret stays in memory.
        self._known: _Cache[Caller] = _Cache(clock)
        self._unknown: _Cache[bool] = _Cache(clock)
        self._looks = asyncio.Semaphore(_MAX_LOOKS)
        self._num_waiting = 0

    async def find_caller(self, headers: Headers) -> Caller:
        """Return the sender of a request; raise ApiError 401 without a valid key, OverloadedError if many are new."""
        given = headers.getlist("authorization")
        match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise ApiError(401, "no_api_key", "this needs one header Authorization: Bearer KEY", _CHALLENGE)
        digest = hashlib.sha256(match[1].encode()).digest()
        if (caller := self._known.get(digest)) is not None:
            return caller
        if not self._unknown.get(digest):
            if (key := await self._look_up(match[1])) is not None:
                caller = Caller(key.key_id, key.limits, key.service_class, key.allowed_classes)
                self._known.put(digest, caller)
                return caller
            self._unknown.put(digest, True)
        raise ApiError(401, "wrong_api_key", "this API key is not known, or not any more", _CHALLENGE)

    async def _look_up(self, secret: str) -> ApiKey | None:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError("API keys that are looked up", _MAX_WAITING, _RETRY_S)
        self._num_waiting += 1
        try:
            async with self._looks:
                return await run_in_thread(self._keys.verify, secret)
        finally:
            self._num_waiting -= 1


V = TypeVar("V")


class _Cache(Generic[V]):
    """Values of the last seconds by hash; beyond the bound the oldest is evicted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: OrderedDict[bytes, tuple[float, V]] = OrderedDict()

    def put(self, digest: bytes, value: V) -> None:
        self._found.pop(digest, None)
        self._found[digest] = self._clock(), value
        if len(self._found) > _MAX_CACHED:
            self._found.popitem(last=False)

    def get(self, digest: bytes) -> V | None:
        found = self._found.get(digest)
        return found[1] if found is not None and self._clock() - found[0] < _CACHE_S else None
