"""What a guardrail has to offer, and how the one that is configured is found."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from cosmos3_core.media.pixels import Frames
from deployments.errors import AdapterError

Option = str | int | float | bool

_BUILT_IN = {"cosmos-guardrail": "deployments.stages.cosmos_guardrail:CosmosGuardrail"}
_ALLOWED = f"{', '.join(_BUILT_IN)}, or module:Class of an adapter that can be imported where the guardrail runs"


@runtime_checkable
class Guardrail(Protocol):
    """An adapter. Its methods are called in threads, each of them by one thread at a time.

    Whatever else they raise fails the request, as what they take too long for does.
    """

    def check_text(self, prompt: str) -> None:
        """Look at the prompt of a request, the positive one, as it was given.

        Raises:
            ContentBlocked: it must not be used.
        """

    def check_frames(self, frames: Frames) -> Frames:
        """Look at some frames of a clip, or at an image; clips come in chunks, in order, several clips in turns.

        Args:
            frames: uint8 RGB [F, Y, X, 3], read-only.

        Returns:
            What may be shown instead, of the same shape; ``frames`` themselves where nothing is to be changed.

        Raises:
            ContentBlocked: they must not be used.
        """


def load_guardrail(adapter: str, options: Mapping[str, Option]) -> Guardrail:
    """The adapter of a name, made with its options.

    Raises:
        AdapterError: there is none of that name, it takes no such options, or it is no guardrail.
    """
    module_name, _, class_name = _BUILT_IN.get(adapter, adapter).partition(":")
    if not class_name:
        raise AdapterError(adapter, "there is no such adapter", f"Allowed is {_ALLOWED}.")
    try:
        body = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdapterError(adapter, f"it cannot be imported: {error}", f"Allowed is {_ALLOWED}.") from error
    signature = inspect.signature(body)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise AdapterError(adapter, f"guardrails.options: {error}", f"It takes {signature}.") from None
    made = body(**options)
    if not isinstance(made, Guardrail):
        raise AdapterError(
            adapter, "it lacks check_text or check_frames", "See deployments/stages/guardrail_adapter.py."
        )
    return made
