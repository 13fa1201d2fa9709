"""The only home of facts that depend on the kind of device."""

from __future__ import annotations

import resource
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy.typing as npt
import torch

from cosmos3_core.errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name that users give -> dtype of the weights."""


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """Return the given device; without one the first GPU, or the CPU.

    Raises:
        RequestError: this machine has no such device.
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
    """Return the device of one of several ranks on a machine: GPU number ``local_rank``, or the CPU.

    Raises:
        RequestError: this machine has no such device.
    """
    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return resolved
    mine = resolve_device(f"cuda:{local_rank}")
    torch.cuda.set_device(mine)
    return mine


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue, for instance before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_allocated_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Return the peak of the bytes on a GPU during ``work``, less those before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def read_peak_bytes(device: torch.device) -> int:
    """Return the most bytes that tensors on a GPU, or this process on the CPU, have held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU."""
    # torch's CPU allocator raises a plain RuntimeError.
    is_cpu_allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_cpu_allocation


def forget_unused_memory(device: torch.device) -> None:
    """Release the allocator's unused memory, which is fragmented after it ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def collective_backend(device: torch.device) -> str:
    """Return torch.distributed's backend for tensors on this kind of device."""
    return "nccl" if device.type == "cuda" else "gloo"


def describe(device: torch.device) -> str:
    """Describe the device for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def prefers_cudnn_attention(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether cuDNN's attention kernel is the fastest here, and the reason."""
    if device.type != "cuda":
        return False, f"torch's own is the only fast one on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"cuDNN attention has no {dtype} kernel"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False, "cuDNN attention is only faster from compute capability 9.0"
    return True, "Hopper or newer: 1.8 times FlashAttention-2 at 44,160 tokens on an H200"


def prefers_triton(device: torch.device) -> tuple[bool, str]:
    """Return whether Triton's kernels run here, and the reason."""
    if device.type != "cuda":
        return False, f"no Triton kernels on {device.type}"
    if find_spec("triton") is None:
        return False, "Triton is not installed"
    return True, "fewer passes over memory"


def prefers_channels_last(device: torch.device) -> bool:
    """Return whether convolutions are faster in the memory format channels last."""
    return device.type == "cuda"


def latents_to_fill(device: torch.device, *, is_split: bool = False) -> int:
    """Return the latent positions, rows x columns x frames, that the video decoder should work on at a time.

    With fewer, a GPU waits for launches, and for the neighbours if frames are split; a CPU does neither.
    docs/performance.md has the measurements.
    """
    if device.type != "cuda":
        return 1
    return 3600 if is_split else 960


class AlternatingBuffers:
    """Two buffers on the CPU that alternate, each as large as the largest tensor so far.

    Args:
        is_pinned: whether a GPU copies into them.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def next_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a buffer of a uint8 tensor's shape, reserved until the call after the next."""
        self._buffers.reverse()
        if self._buffers[0].numel() < tensor.numel():
            self._buffers[0] = torch.empty(tensor.numel(), dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._buffers[0][: tensor.numel()].view(tensor.shape)


class HostCopies:
    """Copies a device's tensors to the CPU while the device keeps computing.

    On a GPU a stream of its own copies into two alternating pinned buffers; on a CPU nothing is copied.

    Attributes:
        is_asynchronous: whether the device keeps computing during a copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_asynchronous = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.is_asynchronous else None
        self._buffers = AlternatingBuffers(is_pinned=True)

    def begin(self, tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
        """Queue the copy of a uint8 tensor after the work that makes it; calling the result waits for the copy.

        The array is valid until the copy after the next begins.
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
