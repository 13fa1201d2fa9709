"""Chooses the implementation of each of the video VAE's operators, once when the VAE is built, and logs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cosmos3_core.device import prefers_triton
from cosmos3_core.ops import video_eager

logger = logging.getLogger(__name__)

WindowOp = Callable[
    [Tensor, Tensor | None, int, tuple[int, int], torch.memory_format, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor],
]
UpsampleOp = Callable[[Tensor, int], Tensor]
AddShortcutOp = Callable[
    [Tensor, Tensor, tuple[int, int, int], tuple[int, int, int], Tensor | None, Tensor | None], Tensor
]


@dataclass(frozen=True)
class VideoOps:
    """The chosen implementations, one field per operator.

    Attributes:
        window: see :func:`cosmos3_core.ops.video_eager.window`.
        upsample: see :func:`cosmos3_core.ops.video_eager.upsample`.
        add_shortcut: see :func:`cosmos3_core.ops.video_eager.add_shortcut`.
        take_bias: whether convolutions before a window or a shortcut leave their bias to it. This saves a pass over
            memory with cuDNN, whose convolutions add the bias in a second kernel; oneDNN's add it in the same one.
    """

    window: WindowOp = video_eager.window
    upsample: UpsampleOp = video_eager.upsample
    add_shortcut: AddShortcutOp = video_eager.add_shortcut
    take_bias: bool = False


def _eager() -> VideoOps:
    return VideoOps()


def _triton() -> VideoOps:
    # Imported here: only builds of torch for GPUs have Triton.
    from cosmos3_core.ops import video_triton

    kernels: ModuleType = video_triton
    return VideoOps(kernels.window, kernels.upsample, kernels.add_shortcut, take_bias=True)


IMPLEMENTATIONS: dict[str, Callable[[], VideoOps]] = {"eager": _eager, "triton": _triton}


def select_video_ops(device: torch.device) -> VideoOps:
    """Choose the operators for a device."""
    use_triton, reason = prefers_triton(device)
    name = "triton" if use_triton else "eager"
    logger.info("video VAE ops: %s (%s)", name, reason)
    return IMPLEMENTATIONS[name]()
