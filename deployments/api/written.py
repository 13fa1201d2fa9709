"""Errors that name fields as the body does: a request has names of its own, and some are made of other fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cosmos3_core.errors import RequestError
from deployments.failures import unwrap_error


@dataclass(frozen=True)
class FieldOrigin:
    """What a field of a request comes from.

    Attributes:
        name: of the field in the body.
        value: that it has there, where the request's is made of it; None where both are the same.
    """

    name: str
    value: Any = None

    def error(self, reason: RequestError) -> RequestError:
        """An error about the request's field as one about the body's."""
        if self.value is None:
            return reason.of_parts(self.name, reason.given, reason.allowed, reason.hint)
        allowed = f"what makes {reason.field} {reason.allowed}"
        return type(reason)(self.name, self.value, allowed, f"It makes {reason.field}={reason.given}. {reason.hint}")


FieldOrigins = Mapping[str, FieldOrigin]
"""A request's field -> what it comes from, where the body calls it otherwise."""


@contextmanager
def as_written(origins: FieldOrigins) -> Iterator[None]:
    """Errors about fields that are raised inside, here or in another process, name those of the body.

    Args:
        origins: of the request's fields.

    Raises:
        Exception: whatever was raised.
    """
    try:
        yield
    except Exception as error:  # told apart by what it wraps
        reason = unwrap_error(error)
        origin = origins.get(reason.field) if isinstance(reason, RequestError) else None
        if origin is None or not isinstance(reason, RequestError):
            raise
        raise origin.error(reason) from None
