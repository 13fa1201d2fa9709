"""Events of a request that ranks and their leader make, and the base of all events.

They reach the caller unchanged; :mod:`deployments.jobs.events` has the union and its JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

INTERNAL: Mapping[str, Any] = MappingProxyType({"is_internal": True})
"""Metadata of fields that stay inside the app."""


def internal(default: T) -> T:
    """Return a field that stays inside the app; clients see its default."""
    value: T = field(default=default, metadata=INTERNAL)
    return value


@dataclass(frozen=True)
class Event:
    """Something happened to a request.

    Attributes:
        KIND: its name in JSON; "" for events that no client sees.
        seq: its number in the video's history, from 1; None for events that are not kept.
        data: its JSON values as a client received them, also unknown ones; None inside the app.
    """

    KIND: ClassVar[str] = ""
    seq: int | None = field(default=None, kw_only=True, metadata=INTERNAL)
    data: Mapping[str, Any] | None = field(default=None, kw_only=True, metadata=INTERNAL, repr=False, compare=False)

    @property
    def kind(self) -> str:
        """Name of its kind in JSON."""
        return self.KIND


def public_names(kind: type[Event]) -> tuple[str, ...]:
    """Return the names of the fields of a kind of events that clients see."""
    return tuple(each.name for each in fields(kind) if "is_internal" not in each.metadata)


@dataclass(frozen=True)
class QueuePosition(Event):
    """The request waits behind ``position`` others: first for a runner, then for a gang.

    Its last step ends in about ``eta_s`` seconds; None if that cannot be estimated. ``pid`` is the reporting process.
    """

    KIND = "queued"
    position: int
    pid: int = internal(0)
    eta_s: float | None = None


@dataclass(frozen=True)
class StepDone(Event):
    """Step ``step`` of ``num_steps`` is done, counted from 1.

    Attributes:
        sigma: noise level that is left.
        step_s: seconds that the step took, as a share of its quantum.
        eta_s: seconds until the last step; None if not estimated.
        pid: of the rank.
    """

    KIND = "step"
    step: int
    num_steps: int
    sigma: float
    step_s: float | None = None
    eta_s: float | None = field(default=None, kw_only=True)
    pid: int | None = None


@dataclass(frozen=True)
class PreviewReady(Event):
    """A preview of the pictures after ``step`` steps, for a request that asked for previews.

    ``image`` is a whole file of ``media_type``, below 50 kB: an animation, or a still where the request makes an image.
    Steps after ``step`` may come before it. ``pid`` is the leader's.
    """

    KIND = "preview"
    step: int
    sigma: float
    media_type: str
    image: bytes = field(repr=False)
    pid: int = internal(0)


@dataclass(frozen=True)
class PreviewsOff(Event):
    """The request continues without previews, or without more. ``pid`` is of the process that cannot make them."""

    KIND = "previews_off"
    reason: str
    pid: int = internal(0)
