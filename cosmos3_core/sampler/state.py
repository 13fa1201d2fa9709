"""The state of one request between two steps, as a value.

It can be stepped, interleaved with another request's, written to bytes, moved to another process and resumed there with
the same result, bit for bit. A run has no other state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cosmos3_core.errors import StateError
from cosmos3_core.sampler.unipc import SolverState

_FORMAT = "cosmos3-denoise-state-1"
_HEADER = "header"


@dataclass(frozen=True)
class DenoiseState:
    """The progress of a request's denoising.

    Attributes:
        step_index: number of finished steps, the index of the next one.
        solver: modality -> latents and solver history, fp32, in any order.
        fingerprint: hash of the request that this state belongs to (prompts, shape, schedule, guidance).
    """

    step_index: int
    solver: Mapping[str, SolverState]
    fingerprint: str

    @property
    def latents(self) -> dict[str, Tensor]:
        """modality -> latents at the current noise level, fp32."""
        return {name: state.sample for name, state in self.solver.items()}

    def to(self, device: torch.device | str) -> DenoiseState:
        """Return the same state with its tensors on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in _flatten(self.solver).items()}
        return DenoiseState(self.step_index, _unflatten(moved), self.fingerprint)

    def to_bytes(self) -> bytes:
        """Serialise the state as a safetensors file, independent of the device."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _flatten(self.solver).items()}
        header = {"format": _FORMAT, "step_index": self.step_index, "fingerprint": self.fingerprint}
        tensors[_HEADER] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        return save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> DenoiseState:
        """Read the bytes of :meth:`to_bytes`; tensors on the CPU.

        Raises:
            StateError: the bytes are damaged, or not a state.
        """
        try:
            tensors = load(data)
            header: dict[str, Any] = json.loads(bytes(tensors.pop(_HEADER).tolist()))
            if header["format"] != _FORMAT:
                raise StateError(f"a denoise state of another version: {header['format']!r}, this one is {_FORMAT!r}")
            return cls(int(header["step_index"]), _unflatten(tensors), str(header["fingerprint"]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"not a saved denoise state: {error}") from None


def _flatten(solver: Mapping[str, SolverState]) -> dict[str, Tensor]:
    flat = {}
    for name, state in solver.items():
        flat[f"{name}/sample"] = state.sample
        if state.corrected is not None:
            flat[f"{name}/corrected"] = state.corrected
        flat.update({f"{name}/x0/{age}": x0 for age, x0 in enumerate(state.x0)})
    return flat


def _unflatten(tensors: Mapping[str, Tensor]) -> dict[str, SolverState]:
    names = dict.fromkeys(name.split("/")[0] for name in tensors)
    return {
        name: SolverState(
            sample=tensors[f"{name}/sample"],
            corrected=tensors.get(f"{name}/corrected"),
            x0=tuple(tensors[key] for key in sorted(tensors) if key.startswith(f"{name}/x0/")),
        )
        for name in names
    }
