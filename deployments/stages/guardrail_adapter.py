"""The protocol of guardrail adapters, and the loader of the configured one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from cosmos3_core.media.pixels import Frames
from deployments.errors import AdapterError

Option = str | int | float | bool

_BUILT_IN = {"cosmos-guardrail": "deployments.stages.cosmos_guardrail:CosmosGuardrail"}
_HINT = f"It must be {', '.join(_BUILT_IN)}, or module:Class of an adapter that the guardrail's node can import."


@runtime_checkable
class GuardrailAdapter(Protocol):
    """A guardrail. Each method is called by one thread at a time.

    Any undocumented exception, and a call past its timeout, fail the request.
    """

    def check_text(self, prompt: str) -> None:
        """Check a request's positive prompt, as the caller wrote it; raise ContentBlocked to block it."""

    def check_frames(self, frames: Frames) -> Frames:
        """Check an image, or a chunk of a clip. A clip's chunks come in order; chunks of several clips may alternate.

        Args:
            frames: uint8 RGB [F, Y, X, 3], read-only.

        Returns:
            The frames to show, of the same shape; ``frames`` itself if nothing changes.

        Raises:
            ContentBlocked: the frames must not be shown.
        """


def load_guardrail(adapter: str, options: Mapping[str, Option]) -> GuardrailAdapter:
    """Import and construct an adapter by its name; raise AdapterError if it cannot be used with these options."""
    module_name, _, class_name = _BUILT_IN.get(adapter, adapter).partition(":")
    if not class_name:
        raise AdapterError(adapter, "there is no such adapter", _HINT)
    try:
        body = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdapterError(adapter, f"it cannot be imported: {error}", _HINT) from error
    signature = inspect.signature(body)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise AdapterError(adapter, f"guardrails.options: {error}", f"It takes {signature}.") from None
    guardrail = body(**options)
    if not isinstance(guardrail, GuardrailAdapter):
        raise AdapterError(
            adapter, "it lacks check_text or check_frames", "See deployments/stages/guardrail_adapter.py."
        )
    return guardrail
