"""Chooses the implementation of each operator, once when an engine starts, and logs it.

Every fast implementation has the signature of its eager twin in :mod:`cosmos3_core.ops.eager` and is compared with it
in the tests. A new kernel is one function, one row in ``IMPLEMENTATIONS`` and one tolerance in the test's table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosmos3_core import checks
from cosmos3_core.device import prefers_cudnn_attention
from cosmos3_core.model.rope import RopeTable
from cosmos3_core.ops import eager, sdpa, triton_ops

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "attention": {"eager": eager.attention, "sdpa": sdpa.attention, "cudnn": sdpa.attention_cudnn},
    "rms_norm": {"eager": eager.rms_norm, "triton": triton_ops.rms_norm},
    "add_rms_norm": {"eager": eager.add_rms_norm, "triton": triton_ops.add_rms_norm},
    "norm_rope": {"eager": eager.norm_rope, "triton": triton_ops.norm_rope},
    "silu_mul": {"eager": eager.silu_mul, "triton": triton_ops.silu_mul},
}


def _all_rows(num_tokens: int) -> slice:
    return slice(0, num_tokens)


def _keep_all(x: Tensor, num_tokens: int) -> Tensor:
    return x


@dataclass(frozen=True)
class Ops:
    """The chosen implementations, one field per operator.

    Attributes:
        attention, rms_norm, add_rms_norm, norm_rope, silu_mul: see :mod:`cosmos3_core.ops.eager`.
        own_rows: S -> run of the S generated tokens that this rank works on; all of them without sequence parallelism.
            May reach past the last one, into padding.
        all_tokens: (this rank's tokens, S) -> all S of them.
    """

    attention: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = sdpa.attention
    rms_norm: Callable[[Tensor, Tensor, float, bool], Tensor] = eager.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]] = eager.add_rms_norm
    norm_rope: Callable[[Tensor, Tensor, float, bool, RopeTable], Tensor] = eager.norm_rope
    silu_mul: Callable[[Tensor], Tensor] = eager.silu_mul
    own_rows: Callable[[int], slice] = _all_rows
    all_tokens: Callable[[Tensor, int], Tensor] = _keep_all


def names_of(ops: Ops) -> dict[str, str]:
    """Return operator -> name of its implementation."""
    return {
        op: next(name for name, implementation in known.items() if implementation is getattr(ops, op))
        for op, known in IMPLEMENTATIONS.items()
    }


def select_ops(device: torch.device, dtype: torch.dtype, choices: Mapping[str, str] | None = None) -> Ops:
    """Choose the operators for a device and dtype.

    Args:
        choices: operator -> implementation name, to override the choice.

    Raises:
        RequestError: an operator or implementation is unknown; the message lists the known ones.
    """
    chosen = {op: _best_elementwise(device) for op in IMPLEMENTATIONS} | {"attention": _best_attention(device, dtype)}
    for op, name in (choices or {}).items():
        checks.choice("ops", op, tuple(sorted(IMPLEMENTATIONS)))
        checks.choice(f"ops.{op}", name, tuple(sorted(IMPLEMENTATIONS[op])))
        chosen[op] = (name, "asked for")
    for op, (name, reason) in chosen.items():
        logger.info("op %s: %s (%s)", op, name, reason)
    return Ops(**{op: IMPLEMENTATIONS[op][name] for op, (name, _) in chosen.items()})


def _best_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    use_cudnn, reason = prefers_cudnn_attention(device, dtype)
    return ("cudnn" if use_cudnn else "sdpa"), reason


def _best_elementwise(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "eager", f"there is no fused kernel for {device.type}"
    reason = triton_ops.why_unavailable(device)
    return ("triton", "one pass over memory each") if reason is None else ("eager", reason)
