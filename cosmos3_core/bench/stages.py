"""Measures every stage of a request except sound: prefill, step, decode, and both encoders."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from cosmos3_core.bench.encode import Footage, Settings, write_ours
from cosmos3_core.bench.ours import Ours, video_vae
from cosmos3_core.bench.report import Row
from cosmos3_core.bench.stopwatch import Stopwatch
from cosmos3_core.bench.subject import Subject, Work
from cosmos3_core.bench.theirs import Theirs
from cosmos3_core.bench.vae import time_vae
from cosmos3_core.device import synchronize
from cosmos3_core.media.pixels import to_uint8


def measure_stages(subject: Subject, work: Work, *, runs: int, compare: bool) -> list[Row]:
    """Measure the seconds of every stage, ours and theirs in turns, so that a slow machine slows both.

    Raises:
        ImportError: ``compare``, and diffusers is not installed in the version compared with.
    """
    watch = Stopwatch(partial(synchronize, subject.device))
    ours = Ours(subject, work)
    theirs = Theirs(subject, work) if compare else None
    for run in range(-1, runs):
        watch.time_ours("prefill, both prompts", run, ours.prefill)
        ours.start()
        watch.time_ours("step, both branches", run, ours.step)
        if theirs is not None:
            # Their loop runs two steps, and only the second counts.
            theirs.steps(1, watch.row("step, both branches").theirs.append if run >= 0 else lambda seconds: None)
    vae = video_vae(subject)
    time_vae(watch, subject, work.clip, vae, None if theirs is None else theirs.vae, runs)

    pixels_BCFYX = torch.cat(list(vae.decode(subject.latents(work.clip), chunk_latents=work.clip.chunk_latents)), dim=2)
    frames = to_uint8(pixels_BCFYX).cpu().numpy()
    footage = Footage(*frames.shape[:3])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.mp4"
        for run in range(-1, runs):
            watch.time_ours("encode of the clip (mp4)", run, write_ours, path, footage, [frames], Settings())
    return watch.rows
