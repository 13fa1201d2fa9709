"""Everything that depends on the kind of device, so that no other module names one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy.typing as npt
import torch

from cosmos3_core.errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights may be held in, by the names that users give."""


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device asked for, or the first GPU where there is one, or the CPU.

    Raises:
        RequestError: not a device that this machine has.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()  # "meta" and devices without a driver fail here
    except (RuntimeError, AssertionError, TypeError) as error:
        allowed = "cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
        raise RequestError("device", str(device), allowed, str(error).splitlines()[0]) from None
    return resolved


def local_device(device: torch.device | str | None, local_rank: int) -> torch.device:
    """The device of one of several ranks on a machine: its own GPU, counted by ``local_rank``, where there are GPUs.

    Raises:
        RequestError: not a device that this machine has.
    """
    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return resolved
    mine = resolve_device(f"cuda:{local_rank}")
    torch.cuda.set_device(mine)
    return mine


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a clock read before that tells nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_allocated_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """By how much the tensors on a GPU peak, while ``work`` is done, over those that were there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU."""
    # torch's CPU allocator has no exception type of its own.
    is_cpus = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_cpus


def forget_unused_memory(device: torch.device) -> None:
    """Give back what the allocator keeps for later: after it ran out, its pieces fit nothing else."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def collective_backend(device: torch.device) -> str:
    """torch.distributed's backend for tensors on this kind of device."""
    return "nccl" if device.type == "cuda" else "gloo"


def describe(device: torch.device) -> str:
    """Return the device in words, for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def prefers_cudnn_attention(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether cuDNN's attention kernel is the fast one here, and why or why not."""
    if device.type != "cuda":
        return False, f"torch's own is the only fast one on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"cuDNN attention has no {dtype} kernel"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False, "cuDNN attention is only faster from compute capability 9.0"
    return True, "Hopper or newer: 1.8 times FlashAttention-2 at 44,160 tokens on an H200"


def prefers_triton(device: torch.device) -> tuple[bool, str]:
    """Return whether Triton's kernels run here, and why or why not."""
    if device.type != "cuda":
        return False, f"no Triton kernels on {device.type}"
    if find_spec("triton") is None:
        return False, "Triton is not installed"
    return True, "fewer passes over memory"


def prefers_channels_last(device: torch.device) -> bool:
    """Return whether convolutions are faster where the channels of a position lie side by side in memory."""
    return device.type == "cuda"


def latents_to_fill(device: torch.device, *, is_split: bool = False) -> int:
    """Return the latent positions, rows x columns x frames, that the video decoder should work on at a time.

    With fewer a GPU waits for launches: on an H200 a clip of 12 x 20 rows and columns decodes in 0.41, 0.36 and 0.34 s
    in chunks of one, two and four frames, but one of 30 x 52 gains 1 % for half as much memory again. A CPU has no
    launches to wait for.

    Where frames are split, every convolution waits for the neighbours as well, once a chunk: 720p over four H200s, 45 x
    20 rows and columns each, decodes in 1.75, 1.49 and 1.45 s in chunks of two, three and four frames.
    """
    if device.type != "cuda":
        return 1
    return 3600 if is_split else 960


class TurningBuffers:
    """Two buffers on the CPU that take turns, each as large as the largest tensor that it was asked to hold.

    Args:
        is_pinned: whether a GPU copies into them.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def next_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Room for a uint8 tensor, of its shape; nobody else's until the next but one is asked for."""
        self._buffers.reverse()
        if self._buffers[0].numel() < tensor.numel():
            self._buffers[0] = torch.empty(tensor.numel(), dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._buffers[0][: tensor.numel()].view(tensor.shape)


class HostCopies:
    """Copies of a device's tensors on the CPU, made beside the device's work.

    On a GPU into two pinned buffers that take turns, on a stream of their own; on a CPU nothing is copied.

    Args:
        device: that the tensors are on.

    Attributes:
        is_asynchronous: whether the device works on while a copy is made.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_asynchronous = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.is_asynchronous else None
        self._buffers = TurningBuffers(is_pinned=True)

    def begin(self, tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
        """Begin to copy a uint8 tensor, when all that makes it is done; calling the result waits for the copy.

        The array is good until the next but one is begun.
        """
        if self._stream is None:
            return tensor.numpy
        host = self._buffers.next_like(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            done.record()
        tensor.record_stream(self._stream)

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            return host.numpy()

        return wait
