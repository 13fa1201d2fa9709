"""NVIDIA's ``cosmos-guardrail``: prompts by a list of words and a language model, faces in pictures pixelated.

Of the package's ``CosmosSafetyChecker`` the models of text are asked one by one: asked as a whole, it passes every
prompt that its language model failed on, and writes blocked prompts into the log.
"""

from __future__ import annotations

import importlib
from typing import Any

from cosmos3_core.media.pixels import Frames
from deployments.errors import AdapterError, ContentBlocked

_NAME = "cosmos-guardrail"
# Model -> the method that says whether a prompt is safe, and raises where it cannot say.
_TEXT_METHODS = {"Blocklist": "is_safe", "Qwen3Guard": "extract_label_and_categories"}
_FRAME_MODELS = {"RetinaFaceFilter"}


class CosmosGuardrail:
    """See the module. The models are read from the Hugging Face cache, or fetched into it.

    Args:
        device: torch device string that the models run on.
        num_threads: torch's CPU threads.

    Raises:
        AdapterError: the package is not there, or is another version than those that this adapter knows.
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
            raise AdapterError(_NAME, problem, f"Known are {known}, of version 0.3; others may pass what they fail on.")
        self._text_checks = [getattr(found[name], method) for name, method in _TEXT_METHODS.items()]

    def check_text(self, prompt: str) -> None:
        """Check a positive prompt, as the protocol says. NVIDIA checks no negative ones either."""
        for check in self._text_checks:
            is_safe, _ = check(prompt)
            if not is_safe:
                raise ContentBlocked("prompt")

    def check_frames(self, frames: Frames) -> Frames:
        """As :class:`deployments.stages.guardrail_adapter.Guardrail`."""
        checked: Frames | None = self._checker.check_video_safety(frames.copy())  # which it writes to
        if checked is None:
            raise ContentBlocked("pictures")
        return checked
