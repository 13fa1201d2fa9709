"""What a caller asks for beside the generation itself: how it is queued, whose it is, what is recorded of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.service_config import DEFAULT_CLASS

if TYPE_CHECKING:
    from deployments.jobs.keys import KeyLimits


@dataclass(frozen=True)
class SubmitOptions:
    """Travels with a request to the Director.

    Attributes:
        request_id: the caller's name for it, for logs; None: one is made up.
        owner: id of the API key that it came with, "" without.
        service_class: name of a class of the configuration.
        classes: that its key may name; None: all of the configuration's.
        limits: the key's own; None: the configuration's.
        idempotency_key: None without.
        previews: how many of them to record, 0 to 32.
        remixed_from: id of the job whose request this one takes over; None without.
        warnings: fields that were accepted without effect.
        skip_guardrails: the caller does without them, and may.
    """

    request_id: str | None = None
    owner: str = ""
    service_class: str = DEFAULT_CLASS
    classes: tuple[str, ...] | None = None
    limits: KeyLimits | None = None
    idempotency_key: str | None = None
    previews: int = 0
    remixed_from: str | None = None
    warnings: tuple[str, ...] = ()
    skip_guardrails: bool = False
