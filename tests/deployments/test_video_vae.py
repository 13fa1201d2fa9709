"""The decoder's steps that can be shown without Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cluster.errors import OutOfMemory
from deployments.video_vae import _next_frames

CPU = torch.device("cpu")


def chunks(error: Exception) -> Iterator[torch.Tensor]:
    yield torch.zeros(1, 3, 2, 4, 6)
    raise error


def test_a_clip_that_does_not_fit_is_told_as_such() -> None:
    source = chunks(torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.\nMore words."))
    frames = _next_frames(source, CPU)
    assert frames is not None
    assert (frames.shape, frames.dtype) == ((2, 4, 6, 3), "uint8")
    with pytest.raises(OutOfMemory, match="Tried to allocate"):
        _next_frames(source, CPU)
    assert _next_frames(source, CPU) is None


def test_any_other_error_is_left_as_it_is() -> None:
    source = chunks(ZeroDivisionError("a bug"))
    _next_frames(source, CPU)
    with pytest.raises(ZeroDivisionError):
        _next_frames(source, CPU)
