"""Guardrail adapters: their protocol, the loader of the configured one, and that of NVIDIA's package."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from cosmos3_core.media.pixels import Frames
from deployments.errors import AdapterError, ContentBlocked

Option = str | int | float | bool

_COSMOS = "cosmos-guardrail"
_BUILT_IN = {_COSMOS: f"{__name__}:CosmosGuardrail"}
_HINT = f"It must be {', '.join(_BUILT_IN)}, or module:Class of an adapter that the guardrail's node can import."
# Model of cosmos-guardrail -> its method that returns whether a prompt is safe, and raises if it cannot.
_TEXT_METHODS = {"Blocklist": "is_safe", "Qwen3Guard": "extract_label_and_categories"}
_FRAME_MODELS = {"RetinaFaceFilter"}


@runtime_checkable
class GuardrailAdapter(Protocol):
    """A guardrail. Each method is called by one thread at a time.

    Any undocumented exception, and a call past its timeout, fail the request.
    """

    def check_text(self, prompt: str) -> None:
        """Check a request's positive prompt, as the caller wrote it; raise ContentBlocked to block it."""

    def check_frames(self, frames: Frames) -> Frames:
        """Check an image, or a chunk of a clip; raise ContentBlocked if the frames must not be shown.

        A clip's chunks come in order; chunks of several clips may alternate.

        Args:
            frames: uint8 RGB [F, Y, X, 3], read-only.

        Returns:
            The frames to show, of the same shape; ``frames`` itself if nothing changes.
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


class CosmosGuardrail:
    """Adapter of NVIDIA's ``cosmos-guardrail``: a block list and a language model for prompts, pixelated faces.

    It loads its models from the Hugging Face cache, or downloads them into it. It calls the text models of
    ``CosmosSafetyChecker`` one by one, because the checker itself passes every prompt that its language model failed
    on, and logs blocked prompts.

    Raises:
        AdapterError: the package is not installed, or is a version that this adapter does not know.
    """

    def __init__(self, device: str = "cpu", num_threads: int = 1) -> None:
        import torch

        torch.set_num_threads(num_threads)
        try:
            package = importlib.import_module("cosmos_guardrail")
        except ImportError as error:
            hint = f"Run `pip install {_COSMOS}` on every node that may run the guardrail."
            raise AdapterError(_COSMOS, f"its package cannot be imported: {error}", hint) from error
        self._checker: Any = package.CosmosSafetyChecker()
        self._checker.to(device)
        found = {type(model).__name__: model for model in self._checker.models}
        if set(found) != {*_TEXT_METHODS, *_FRAME_MODELS}:
            problem = f"the package has the models {sorted(found)}"
            known = sorted({*_TEXT_METHODS, *_FRAME_MODELS})
            raise AdapterError(_COSMOS, problem, f"They must be {known}, as in version 0.3.")
        self._text_checks = [getattr(found[name], method) for name, method in _TEXT_METHODS.items()]

    def check_text(self, prompt: str) -> None:
        """Check the positive prompt; NVIDIA does not check negative prompts."""
        for check in self._text_checks:
            is_safe, _ = check(prompt)
            if not is_safe:
                raise ContentBlocked("prompt")

    def check_frames(self, frames: Frames) -> Frames:
        """Return the frames with pixelated faces."""
        checked: Frames | None = self._checker.check_video_safety(frames.copy())  # the checker writes into it
        if checked is None:
            raise ContentBlocked("pictures")
        return checked
