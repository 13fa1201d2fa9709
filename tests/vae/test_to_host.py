"""Copies of decoded pixels to the host: same bytes and order, with the next chunk started before one is returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cosmos3_core.device import AlternatingBuffers, HostCopies
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.vae.to_host import frames_on_host

CHUNKS = [torch.rand(1, 3, frames, 4, 6, generator=torch.Generator().manual_seed(frames)) * 2 - 1 for frames in (1, 4)]
CHUNKS += [-CHUNKS[1], CHUNKS[1] / 2]


class SlowCopies:
    """Two buffers that take turns, as on a GPU; says what was begun and what waited for."""

    is_asynchronous = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self._buffers = AlternatingBuffers(is_pinned=False)

    def begin(self, tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
        number = sum(word.startswith("begin") for word in self.said)
        self.said.append(f"begin {number}")
        host = self._buffers.next_like(tensor)

        def wait() -> npt.NDArray[Any]:
            self.said.append(f"wait {number}")
            return host.copy_(tensor).numpy()

        return wait


@pytest.mark.parametrize("num_chunks", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("make", [SlowCopies, lambda: HostCopies(torch.device("cpu"))], ids=["buffers", "cpu"])
def test_frames_are_the_chunks_bytes_in_order(make: Callable[[], Any], num_chunks: int) -> None:
    found = [frames.copy() for frames in frames_on_host(iter(CHUNKS[:num_chunks]), cast(HostCopies, make()))]
    assert [frames.shape for frames in found] == [(frames, 4, 6, 3) for frames in (1, 4, 4, 4)[:num_chunks]]
    for frames, chunk in zip(found, CHUNKS, strict=False):
        assert np.array_equal(frames, to_uint8(chunk).numpy())


def test_the_first_chunk_waits_for_no_other_and_later_ones_are_copied_beside_the_next() -> None:
    copies = SlowCopies()

    def chunks() -> Iterator[torch.Tensor]:
        for number, chunk in enumerate(CHUNKS):
            copies.said.append(f"make {number}")
            yield chunk

    for number, _ in enumerate(frames_on_host(chunks(), cast(HostCopies, copies))):
        copies.said.append(f"out {number}")
    assert copies.said == [
        *("make 0", "begin 0", "wait 0", "out 0"),
        *("make 1", "begin 1", "make 2", "begin 2", "wait 1", "out 1"),
        *("make 3", "begin 3", "wait 2", "out 2", "wait 3", "out 3"),
    ]


def test_a_cpus_chunks_are_made_one_at_a_time_and_copied_never() -> None:
    made = []

    def chunks() -> Iterator[torch.Tensor]:
        for number, chunk in enumerate(CHUNKS):
            made.append(number)
            yield chunk

    frames = frames_on_host(chunks(), HostCopies(torch.device("cpu")))
    for number in range(len(CHUNKS)):
        next(frames)
        assert made == list(range(number + 1))
    tensor = torch.zeros(3, dtype=torch.uint8)
    assert HostCopies(torch.device("cpu")).begin(tensor)().ctypes.data == tensor.data_ptr()


def test_buffers_take_turns_and_are_made_anew_only_to_grow() -> None:
    buffers = AlternatingBuffers(is_pinned=False)
    sizes = [(2, 3), (4, 3), (1, 3), (3, 4), (5, 3), (2, 6)]
    rooms = [buffers.next_like(torch.zeros(size, dtype=torch.uint8)) for size in sizes]
    assert [tuple(room.shape) for room in rooms] == sizes
    assert {room.dtype for room in rooms} == {torch.uint8}
    first, second, third, fourth, fifth, sixth = (room.data_ptr() for room in rooms)
    assert first == third != second == fourth
    assert fifth not in (first, second), "15 bytes do not fit where six were"
    assert sixth == second
