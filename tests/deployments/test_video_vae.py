"""The decoders' steps that can be shown without Ray."""

from __future__ import annotations

import torch

from deployments.audio_vae import _next_samples
from deployments.video_vae import _next_frames


def test_frames_come_as_bytes_and_end_with_none() -> None:
    source = iter([torch.zeros(1, 3, 2, 4, 6)])
    frames = _next_frames(source)
    assert frames is not None
    assert (frames.shape, frames.dtype) == ((2, 4, 6, 3), "uint8")
    assert _next_frames(source) is None


def test_samples_come_as_floats_and_end_with_none() -> None:
    source = iter([torch.full((2, 7), 0.5)])
    samples = _next_samples(source)
    assert samples is not None
    assert (samples.shape, samples.dtype) == ((2, 7), "float32")
    assert _next_samples(source) is None
