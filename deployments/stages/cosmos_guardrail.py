"""Adapter of NVIDIA's ``cosmos-guardrail``: a block list and a language model for prompts, pixelated faces in frames.

The adapter calls the text models of ``CosmosSafetyChecker`` one by one, because the checker itself passes every prompt
that its language model failed on, and logs blocked prompts.
"""

from __future__ import annotations

import importlib
from typing import Any

from cosmos3_core.media.pixels import Frames
from deployments.errors import AdapterError, ContentBlocked

_NAME = "cosmos-guardrail"
# Model -> its method that returns whether a prompt is safe, and raises if it cannot.
_TEXT_METHODS = {"Blocklist": "is_safe", "Qwen3Guard": "extract_label_and_categories"}
_FRAME_MODELS = {"RetinaFaceFilter"}


class CosmosGuardrail:
    """The guardrail ``cosmos-guardrail``. Loads its models from the Hugging Face cache, or downloads them into it.

    Raises:
        AdapterError: the package is not installed, or is a version that this adapter does not know.
    """

    def __init__(self, device: str = "cpu", num_threads: int = 1) -> None:
        import torch

        torch.set_num_threads(num_threads)
        try:
            package = importlib.import_module("cosmos_guardrail")
        except ImportError as error:
            hint = f"Run `pip install {_NAME}` on every node that may run the guardrail."
            raise AdapterError(_NAME, f"its package cannot be imported: {error}", hint) from error
        self._checker: Any = package.CosmosSafetyChecker()
        self._checker.to(device)
        found = {type(model).__name__: model for model in self._checker.models}
        if set(found) != {*_TEXT_METHODS, *_FRAME_MODELS}:
            problem = f"the package has the models {sorted(found)}"
            known = sorted({*_TEXT_METHODS, *_FRAME_MODELS})
            raise AdapterError(_NAME, problem, f"They must be {known}, as in version 0.3.")
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
