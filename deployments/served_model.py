"""The one model that is served, as ``/v1/models`` tells of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import CapabilityError
from cosmos3_core.resolve import offered_modes
from deployments.config import AudioVAEStage


@dataclass(frozen=True)
class ServedModel:
    """What ``/v1/models`` tells.

    Attributes:
        name: what clients call it.
        family: of the checkpoint.
        modes: that it offers.
        started_s: since when, in seconds since 1970.
    """

    name: str
    family: str
    modes: tuple[str, ...]
    started_s: float

    @classmethod
    def of(cls, layout: CheckpointLayout, name: str | None, *, is_sound_offered: bool) -> ServedModel:
        """Of a checkpoint that is served from now on; without a name it has the checkpoint's."""
        modes = offered_modes(layout, is_sound_offered=is_sound_offered)
        return cls(name or layout.name, layout.family, modes, time.time())

    def told(self) -> dict[str, Any]:
        """OpenAI's model object, and what the model can do."""
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.started_s),
            "owned_by": "nvidia",
            "family": self.family,
            "modes": list(self.modes),
        }


def offers_sound(audio: AudioVAEStage, layout: CheckpointLayout) -> bool:
    """Return whether an app decodes sound.

    Raises:
        CapabilityError: sound was asked for, and the checkpoint makes none.
    """
    if audio.enabled and not layout.has_sound:
        raise CapabilityError("audio.enabled", True, "null or false", f"{layout.name} makes no sound.")
    return layout.has_sound if audio.enabled is None else audio.enabled
