"""Cosmos3 world models in pure PyTorch: prompt in, video out, in one process. The serving graph builds on this.

Importing the package loads no torch; a name brings in what it needs when it is first used. The main path, prompt to
file, is the function ``generate`` of the module ``cosmos3_core.generate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_core.checkpoint.layout import CheckpointLayout
    from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint
    from cosmos3_core.denoiser import StepEvent
    from cosmos3_core.engine import Engine
    from cosmos3_core.errors import Cosmos3Error
    from cosmos3_core.generate import GenerationResult
    from cosmos3_core.phyai import Cosmos3GenerationPostProcessor, Cosmos3Processor, Cosmos3T2VRequest
    from cosmos3_core.request import GenerationRequest
    from cosmos3_core.sampler.state import DenoiseState
    from cosmos3_core.shapes import pixel_to_latent_shape

_HOMES = {
    "CheckpointLayout": "cosmos3_core.checkpoint.layout",
    "Cosmos3Error": "cosmos3_core.errors",
    "Cosmos3GenerationPostProcessor": "cosmos3_core.phyai",
    "Cosmos3Processor": "cosmos3_core.phyai",
    "Cosmos3T2VRequest": "cosmos3_core.phyai",
    "DenoiseState": "cosmos3_core.sampler.state",
    "Engine": "cosmos3_core.engine",
    "GenerationRequest": "cosmos3_core.request",
    "GenerationResult": "cosmos3_core.generate",
    "StepEvent": "cosmos3_core.denoiser",
    "build_tiny_checkpoint": "cosmos3_core.checkpoint.tiny",
    "pixel_to_latent_shape": "cosmos3_core.shapes",
}

__all__ = [  # noqa: RUF022 - reading order: make, ask, run, keep
    "build_tiny_checkpoint",
    "CheckpointLayout",
    "GenerationRequest",
    "GenerationResult",
    "Engine",
    "Cosmos3Processor",
    "Cosmos3T2VRequest",
    "pixel_to_latent_shape",
    "Cosmos3GenerationPostProcessor",
    "StepEvent",
    "DenoiseState",
    "Cosmos3Error",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
