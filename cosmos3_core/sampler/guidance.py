"""Classifier-free guidance (Ho & Salimans 2022), in one form for every layout: u + g (c - u) in fp32.

No torch here: it only handles tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def needs_two_branches(scale: float) -> bool:
    """Return whether the unconditional branch runs: for every scale but exactly 1 (diffusers' rule)."""
    return scale != 1.0


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Combine two velocities of one shape and any dtype, in fp32."""
    base = unconditional.float()
    return base + scale * (conditional.float() - base)
